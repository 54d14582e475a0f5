"""Draws pictures for captions: opens the models, applies the settings, and records what was drawn."""
