"""Sources into image shards: the plan, its parts, drop counts, and the merge."""
