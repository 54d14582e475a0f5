"""From sources to image shards: the plan of the work, its parts, counts of dropped records, and the merge."""
