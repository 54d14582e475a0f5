"""The stages of the pipeline: one module for each stage, and for each training stage one for its Task."""
