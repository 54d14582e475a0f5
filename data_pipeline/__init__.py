"""Bytes to tensors and back: sources, filters, shards, text and loaders."""
