"""Tests of train/advice."""
