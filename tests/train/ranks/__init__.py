"""Tests of train/ranks."""
