"""Estimates the memory, operations and hours of a training run, without a GPU. Needs no torch."""
