"""Weights on storage: fragments, checkpoints, exports, and released weights of others."""
