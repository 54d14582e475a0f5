"""Weights on storage: fragments, checkpoints, exports, and the dVAE weights that OpenAI released."""
