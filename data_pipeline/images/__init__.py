"""Picture files into arrays of pixels: decoding, area resize, the crops of the paper."""
