"""Shard sets into batches: order, workers, shared memory, cache, transforms."""
