"""Shard sets on storage: rows, parts, versions, deletion. MDS and manifests are known here alone."""
