"""From shard sets to batches: the order of samples, worker processes, shared memory, the shard cache, transforms."""
