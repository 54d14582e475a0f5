"""Shard sets on storage: rows, parts, versions, deletion. Only this room knows the format of MDS files and manifests."""
