"""Shard sets as somebody who means ill would hand them over: every hash is right, and what the files say is not what we write."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streaming import MDSWriter

from data_pipeline.shards.shard_set import ShardSet
from infra.digests import digest


class Payload:
    """Unpickled, it makes a file: the sign that code of the set was run."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.sign,)


def with_columns(made: ShardSet, columns: Mapping[str, str], values: Mapping[str, Any]) -> None:
    """Give the records of the only part of a local set other columns, and rewrite every hash."""
    records = list(made.records())
    root = Path(made.url)
    part = root / made.parts[0]["name"]
    for file in [*part.glob("*.mds"), part / "index.json"]:
        file.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        with MDSWriter(out=scratch, columns=dict(columns), hashes=["xxh64"]) as writer:
            for record in records:
                writer.write({name: values.get(name, record.get(name)) for name in columns})
        for path in Path(scratch).iterdir():
            shutil.copy(path, part)
    rehash(made)


def rehash(made: ShardSet) -> None:
    """Rewrite what marker, index and manifest of a local set of one part say of the files in it, as who forges a set would."""
    root = Path(made.url)
    name = made.parts[0]["name"]
    part = root / name
    shards = json.loads((part / "index.json").read_text())["shards"]
    marker = json.loads((part / "done.json").read_text())
    marker["shards"] = shards
    names = sorted(path.name for path in part.iterdir() if path.name != "done.json")
    marker["files"] = [{"name": each, "bytes": (part / each).stat().st_size, "sha256": _sha256(part / each)} for each in names]
    (part / "done.json").write_text(json.dumps(marker))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["parts"][0]["files"] = marker["files"]
    index = {
        "version": 2,
        "shards": [{**each, "raw_data": {**each["raw_data"], "basename": f"{name}/{each['raw_data']['basename']}"}} for each in shards],
    }
    publish(made, manifest, index)


def publish(made: ShardSet, manifest: dict[str, Any], index: dict[str, Any] | None = None) -> None:
    """Write a manifest (and an index) of a local set, with a content hash that is right, as its newest version."""
    root = Path(made.url)
    if index is None:
        index = json.loads((root / "index.json").read_text())
    parts = [{key: value for key, value in part.items() if key != "name"} for part in manifest["parts"]]
    content = {key: value for key, value in manifest.items() if key not in ("content_hash", "producer")} | {"parts": parts}
    manifest["content_hash"] = digest(content)
    version = root / "versions" / manifest["content_hash"][:16]
    version.mkdir(parents=True, exist_ok=True)
    (version / "excluded.u64").write_bytes((Path(made.version_url) / "excluded.u64").read_bytes())
    for folder in (version, root):
        (folder / "index.json").write_text(json.dumps(index))
        (folder / "manifest.json").write_text(json.dumps(manifest))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
