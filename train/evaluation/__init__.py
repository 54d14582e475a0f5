"""Measures of reconstructions: differences of pixels, perceptual distance, distance of distributions, use of the codebook."""
