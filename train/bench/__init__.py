"""Benchmarks: one module each, one JSON schema, one generated page."""
