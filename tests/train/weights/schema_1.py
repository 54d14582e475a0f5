"""A checkpoint as schema 1 had it: every piece of every rank in index.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from infra import storage
from infra.digests import digest


def as_schema_1(url: str) -> str:
    """Rewrite the index of a local checkpoint, drop its parts, and return the new digest."""
    index = storage.read_json(f"{url}/index.json")
    tensors: dict[str, Any] = {name: {"dtype": entry["dtype"], "size": entry["size"], "chunks": []} for name, entry in index["tensors"].items()}
    for file in sorted(Path(url).glob("rank-*.json")):
        part = storage.read_json(str(file))
        for name, held in part["tensors"].items():
            width = getattr(torch, tensors[name]["dtype"]).itemsize
            each = part["piece"] // width
            for place, sha256 in enumerate(held["sha256"]):
                length = min(each, held["length"] - place * each)
                where = {"file": file.with_suffix(".bin").name, "start": held["start"] + place * each * width, "bytes": length * width}
                tensors[name]["chunks"].append({"offset": held["offset"] + place * each, "length": length, "sha256": sha256} | where)
        file.unlink()
    older = {"tensors": tensors}
    storage.write_json(f"{url}/index.json", older)
    return digest(older)
