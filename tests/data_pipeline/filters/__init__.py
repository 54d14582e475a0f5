"""Tests of data_pipeline/filters."""
