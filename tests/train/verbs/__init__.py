"""Tests of train/verbs."""
