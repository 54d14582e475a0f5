"""Tests of train/bench."""
