"""Decides which pairs are kept: filters of captions and images, each with its reason, and the search for duplicates."""
