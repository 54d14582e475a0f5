"""Tests of train/weights."""
