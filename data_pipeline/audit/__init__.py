"""Looking at shard sets afterwards: integrity of parts and sets, statistics, records drawn at random."""
