"""PowerSGD between machines, applied to the shards that ZeRO leaves on each of them (paper 2.5, E; docs/paper.md 6)."""
