"""Tests of train/planning."""
