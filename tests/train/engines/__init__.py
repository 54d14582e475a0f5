"""Tests of train/engines."""
