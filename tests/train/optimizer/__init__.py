"""Tests of train/optimizer."""
