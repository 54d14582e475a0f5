"""Sources of captioned images: one module for each kind."""
