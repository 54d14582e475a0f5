"""Tests of train/experiments."""
