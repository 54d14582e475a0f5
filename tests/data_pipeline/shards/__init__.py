"""Tests of data_pipeline/shards."""
