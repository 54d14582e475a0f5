"""Bytes, operations and hours of a training run, before any GPU is taken. No torch."""
