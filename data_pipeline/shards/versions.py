"""Versions of a shard set: a version lists finished parts, and the positions of records that are excluded. Merging is idempotent; old versions stay readable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import links
from data_pipeline.shards.part_files import INDEX, U64
from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.schema import read_manifest
from data_pipeline.shards.shard_set import DONE, EXCLUDED, MANIFEST, Record, ShardSet, part_name, read_markers, version_url
from infra import storage, strict_json
from infra.digests import digest
from infra.errors import DataError

_PARALLEL = 16  # looks at markers, each of which may be a request to S3


@dataclass(frozen=True)
class Part:
    """A part of a version."""

    inputs: str
    """Digest of everything that it is made from."""
    source: str
    """The entry of data.sources that its records came from."""


def collect(set_url: str, parts: list[Part], stage: str) -> list[dict[str, Any]]:
    """Markers of finished parts, in order.

    Raises:
        DataError: a part is not finished.
    """
    markers = read_markers(set_url, [part.inputs for part in parts])
    missing = [part_name(part.inputs) for part, marker in zip(parts, markers, strict=True) if marker is None]
    if missing:
        raise DataError(
            f"{set_url}: {len(missing)} of {len(parts)} parts are not finished ({', '.join(missing[:5])}); "
            f"run the stage '{stage}' again, it skips finished parts."
        )
    return [marker for marker in markers if marker is not None]


def merge(
    set_url: str,
    parts: list[Part],
    markers: list[dict[str, Any]],
    schema: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    producer: Mapping[str, Any] | None = None,
    excluded: NDArray[np.int64] | None = None,
) -> ShardSet:
    """Make a version from finished parts, and make it the newest. Merging the same parts again changes nothing, and other versions are not touched.

    Args:
        set_url: place of the shard set.
        parts: the parts, in order.
        markers: the markers of these parts, from ``collect``.
        schema: IMAGE_SCHEMA or CODES_SCHEMA.
        settings: what shaped the records (part of the content hash).
        parents: kind -> content hash of what the records were made from.
        producer: commit and versions (not part of the content hash).
        excluded: sorted positions of stored records that do not belong to the version.
    """
    hidden = np.empty(0, np.int64) if excluded is None else excluded
    stored = sum(marker["count"] for marker in markers)
    packed = hidden.astype(U64).tobytes()
    facts = {
        "schema": schema,
        "count": stored - len(hidden),
        "stored": stored,
        "parts": [{"source": part.source, "count": marker["count"], "files": marker["files"]} for part, marker in zip(parts, markers, strict=True)],
        "excluded": {"count": len(hidden), "sha256": hashlib.sha256(packed).hexdigest()},
        "parents": dict(parents or {}),
        "settings": dict(settings),
    }
    manifest = facts | {"content_hash": digest(facts), "producer": dict(producer or {})}
    for entry, part in zip(manifest["parts"], parts, strict=True):
        entry["name"] = part_name(part.inputs)  # added after hashing: the name of a part is not part of the content
    place = version_url(set_url, str(manifest["content_hash"]))
    index = {"version": 2, "shards": _all_shards(parts, markers)}
    links.check(storage.join(place, MANIFEST))
    before = read_manifest(storage.join(place, MANIFEST)) if storage.exists(storage.join(place, MANIFEST)) else None
    if before is not None and _stands(set_url, before, manifest):
        if before["parts"] != manifest["parts"]:  # of other names: the version keeps those that it has
            index = storage.read_json(storage.join(place, INDEX))
        manifest = before  # keeps its first producer
    else:
        manifest["producer"] = manifest["producer"] if before is None else before["producer"]
        storage.write_bytes(storage.join(place, EXCLUDED), packed)
        storage.write_bytes(storage.join(place, INDEX), strict_json.written(index, for_people=False))
        storage.write_json(storage.join(place, MANIFEST), manifest)
    newest = storage.join(set_url, MANIFEST)
    if not storage.exists(newest) or read_manifest(newest) != manifest:
        storage.write_bytes(storage.join(set_url, INDEX), strict_json.written(index, for_people=False))
        storage.write_json(newest, manifest)
    return ShardSet(set_url, manifest)


def _stands(set_url: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the parts that a version names are there. Another input of equal content has parts of other names, and those of the first may be gone."""
    names = [str(part["name"]) for part in before["parts"]]
    if names == [part["name"] for part in now["parts"]]:
        return True
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return all(pool.map(lambda name: storage.exists(storage.join(set_url, name, DONE)), names))


def _all_shards(parts: list[Part], markers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shards = []
    for part, marker in zip(parts, markers, strict=True):
        for shard in marker["shards"]:
            raw = shard["raw_data"] | {"basename": f"{part_name(part.inputs)}/{shard['raw_data']['basename']}"}
            shards.append(shard | {"raw_data": raw})
    return shards


def write_set(
    url: str,
    parts: Sequence[Iterable[Record]],
    schema: str,
    settings: Mapping[str, Any] | None = None,
    *,
    shard_bytes: int = 1 << 26,
    sources: Sequence[str] = (),
    excluded: NDArray[np.int64] | None = None,
) -> ShardSet:
    """Write and merge a whole set, for benchmarks and tests.

    Args:
        url: place of the set.
        parts: the records of each part.
        schema: IMAGE_SCHEMA or CODES_SCHEMA.
        settings: part of the content hash.
        shard_bytes: size limit of one shard file in bytes.
        sources: the source of each part; empty: all parts have the source ''.
        excluded: as for ``merge``.
    """
    targets = [Part(f"{number:05d}", sources[number] if sources else "") for number in range(len(parts))]
    for target, records in zip(targets, parts, strict=True):
        write_part(url, target.inputs, records, shard_bytes)
    return merge(url, targets, collect(url, targets, "encode"), schema, settings or {}, excluded=excluded)
