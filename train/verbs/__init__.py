"""Commands of launcher.py that are not stages, one module each."""
