"""Tests of data_pipeline/loading."""
