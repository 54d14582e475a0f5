"""Tests of data_pipeline/audit."""
