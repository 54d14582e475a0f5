"""From image files to arrays of pixels: decoding, area resize, and the paper's crops."""
