"""Tests of train/stages."""
