"""Where pairs of picture and captions come from: one module a kind of source."""
