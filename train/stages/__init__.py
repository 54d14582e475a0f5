"""The stages of the pipeline: one module a stage, with its task beside it."""
