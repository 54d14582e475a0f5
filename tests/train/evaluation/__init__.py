"""Tests of train/evaluation."""
