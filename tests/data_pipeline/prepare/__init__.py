"""Tests of data_pipeline/prepare."""
