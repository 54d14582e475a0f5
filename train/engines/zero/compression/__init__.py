"""PowerSGD between machines, on the shards that ZeRO leaves on each (paper 2.5, E; docs/paper.md 6)."""
