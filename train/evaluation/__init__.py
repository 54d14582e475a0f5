"""Measures of reconstructions: pixels, perceptual distance, distribution, use of codes."""
