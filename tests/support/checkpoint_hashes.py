"""The hashes of what a checkpoint holds, whatever the number of ranks that wrote it."""

from __future__ import annotations

from infra import storage


def hashes(url: str) -> dict[str, list[str]]:
    """Of every tensor's piece on every rank, by the tensor's name and the piece's first element."""
    parts = [part for part in storage.list_files(url) if part.startswith("rank-") and part.endswith(".json")]
    held = [entry for part in parts for entry in storage.read_json(storage.join(url, part))["tensors"].items()]
    return {f"{name} {entry['offset']}": entry["sha256"] for name, entry in held}
