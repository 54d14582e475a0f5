"""Drawing what is asked for: what to draw with, how, and what is written down of it."""
