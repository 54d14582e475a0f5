"""Tests of data_pipeline/images."""
