"""Tests of data_pipeline/sources."""
