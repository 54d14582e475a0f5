"""Tests of train/drawing: what is drawn with, what is written down, and what a person hears."""
