"""Inspection of finished shard sets: integrity checks of parts and sets, statistics, and random records."""
