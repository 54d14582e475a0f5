"""Shard sets: parts of MDS shards, an index over all parts, and a manifest that is written last (docs/contracts.md, section 3)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import MDSWriter
from streaming.base.format.mds.reader import MDSReader

from infra import storage
from infra.errors import DataError

IMAGE_SCHEMA = "image/1"
CODES_SCHEMA = "codes/1"
MANIFEST = "manifest.json"
INDEX = "index.json"
DONE = "done.json"
_HASH = "xxh64"  # what StreamingDataset checks on download; manifests carry SHA-256


@dataclass(frozen=True)
class ImageRecord:
    """One captioned image of schema image/1."""

    id: str
    captions: list[str]
    image: bytes
    width: int
    height: int
    source: str
    license: str
    group: str
    split: str

    schema = IMAGE_SCHEMA

    def columns(self) -> dict[str, str]:
        words = dict.fromkeys(("id", "source", "license", "group", "split"), "str")
        return words | {"captions": "json", "image": "bytes", "width": "int", "height": "int"}


@dataclass(frozen=True)
class CodeRecord:
    """Code tokens of one crop of one image, schema codes/1."""

    id: str
    captions: list[str]
    codes: NDArray[np.uint16]
    """uint16 [grid * grid], row-major."""
    crop: dict[str, Any]
    """CropBox.to_json()."""
    crop_index: int
    seed: int

    schema = CODES_SCHEMA

    def columns(self) -> dict[str, str]:
        return {"id": "str", "captions": "json", "codes": f"ndarray:uint16:{self.codes.size}", "crop": "json", "crop_index": "int", "seed": "int"}


Record = ImageRecord | CodeRecord


@dataclass(frozen=True)
class Shard:
    """One MDS file of a set."""

    basename: str
    """Name relative to the set."""
    samples: int
    source: str
    """Name of the data.sources entry that it came from."""
    entry: dict[str, Any]
    """As in index.json."""


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set: its place and its manifest."""

    url: str
    manifest: dict[str, Any]

    @property
    def count(self) -> int:
        """Records that readers show."""
        return self.stored - len(self.removed)

    @property
    def stored(self) -> int:
        """Records in the shards."""
        return int(self.manifest["count"])

    @cached_property
    def shards(self) -> list[Shard]:
        """The files in order."""
        entries = storage.read_json(storage.join(self.url, INDEX))["shards"]
        return [Shard(entry["raw_data"]["basename"], entry["samples"], "", entry) for entry in entries]

    @cached_property
    def removed(self) -> NDArray[np.int64]:
        """Sorted positions of stored records that no reader may show."""
        return np.zeros(0, np.int64)

    @property
    def content_hash(self) -> str:
        return str(self.manifest["content_hash"])

    @property
    def num_parts(self) -> int:
        return len(self.manifest["parts"])

    def records(self) -> Iterator[dict[str, Any]]:
        """All records, part by part, in order."""
        for part in range(self.num_parts):
            yield from read_part(self.url, part)


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_part(
    set_url: str, part: int, records: Iterable[Record], inputs_hash: str, shard_bytes: int = 1 << 26, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write one part: shards, then the marker. Equal records give equal bytes; no record at all is fine. A former part is replaced.

    Args:
        set_url: place of the shard set.
        part: number of the part.
        records: in order; all of one kind.
        inputs_hash: what the part was made from; ``part_done`` compares it.
        shard_bytes: size limit of one shard file in bytes.
        extra: JSON-able, kept in the marker (counts, reasons).

    Returns:
        The marker: inputs, count, files (name, bytes, sha256), extra.
    """
    place = storage.join(set_url, part_name(part))
    # Markers go first: a set whose parts change does not exist until it is merged again.
    storage.delete(storage.join(set_url, MANIFEST))
    storage.delete(storage.join(place, DONE))
    storage.delete_prefix(place)
    with tempfile.TemporaryDirectory(prefix="part-") as folder:
        count = _write_mds(Path(folder), records, shard_bytes)
        files = [{"name": name, **_fingerprint(Path(folder, name))} for name in storage.list_files(folder)]
        marker = {"inputs": inputs_hash, "count": count, "files": files, "extra": dict(extra or {})}
        Path(folder, DONE).write_text(json.dumps(marker, indent=2, sort_keys=True) + "\n")
        storage.upload_folder(Path(folder), place, last=[DONE])
    return marker


class _Inline(ThreadPoolExecutor):
    """Runs what is submitted at once. The writer's threads serve uploads, which are ours; and it sleeps a second whenever one has not started yet."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _write_mds(folder: Path, records: Iterable[Record], shard_bytes: int) -> int:
    count, writer = 0, None
    for record in records:
        if writer is None:
            writer = MDSWriter(out=str(folder), columns=record.columns(), hashes=[_HASH], size_limit=shard_bytes)
            writer.executor = _Inline()
        writer.write({field.name: getattr(record, field.name) for field in dataclasses.fields(record)})
        count += 1
    if writer is None:
        (folder / INDEX).write_text(json.dumps({"shards": [], "version": 2}, sort_keys=True))
    else:
        writer.finish()
    return count


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}


def read_marker(set_url: str, part: int) -> dict[str, Any] | None:
    """The marker of a finished part, or None."""
    url = storage.join(set_url, part_name(part), DONE)
    return storage.read_json(url) if storage.exists(url) else None


def part_done(set_url: str, part: int, inputs_hash: str) -> bool:
    """Whether a part is finished and was made from these very inputs."""
    marker = read_marker(set_url, part)
    return marker is not None and marker["inputs"] == inputs_hash


def merge(
    set_url: str,
    parts: int,
    schema: str,
    settings: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    producer: Mapping[str, Any] | None = None,
) -> ShardSet:
    """Make a set of its finished parts: index over all, leftovers of former runs deleted, manifest last. Merging again changes nothing.

    Args:
        set_url: place of the shard set.
        parts: how many parts the set has.
        schema: IMAGE_SCHEMA or CODES_SCHEMA.
        settings: what shaped the records (part of the content hash).
        parents: kind -> content hash of what the records were made from.
        producer: commit and versions (not part of the content hash).

    Raises:
        DataError: a part is not finished.
    """
    markers = [read_marker(set_url, part) for part in range(parts)]
    missing = [part_name(part) for part, marker in enumerate(markers) if marker is None]
    if missing:
        raise DataError(
            f"{set_url}: {len(missing)} of {parts} parts are not finished ({', '.join(missing[:5])}); run the stage again, it skips finished parts."
        )
    _drop_leftovers(set_url, parts)
    finished = [marker for marker in markers if marker is not None]
    storage.write_json(storage.join(set_url, INDEX), {"version": 2, "shards": _merged_shards(set_url, finished)})
    manifest = {
        "schema": schema,
        "count": sum(marker["count"] for marker in finished),
        "parts": [{"count": marker["count"], "files": marker["files"]} for marker in finished],
        "parents": dict(parents or {}),
        "settings": dict(settings),
    }
    manifest |= {"content_hash": digest(manifest), "producer": dict(producer or {})}
    url = storage.join(set_url, MANIFEST)
    if storage.exists(url):
        former = storage.read_json(url)
        if former.get("content_hash") == manifest["content_hash"]:
            return ShardSet(set_url, former)
    storage.write_json(url, manifest)
    return ShardSet(set_url, manifest)


def _drop_leftovers(set_url: str, parts: int) -> None:
    valid = {part_name(part) for part in range(parts)}
    found = {name.split("/")[0] for name in storage.list_files(set_url) if name.startswith("part-")}
    for name in sorted(found - valid):
        storage.delete_prefix(storage.join(set_url, name))


def _merged_shards(set_url: str, markers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shards = []
    for part, marker in enumerate(markers):
        if marker["count"]:
            for shard in storage.read_json(storage.join(set_url, part_name(part), INDEX))["shards"]:
                shard["raw_data"]["basename"] = f"{part_name(part)}/{shard['raw_data']['basename']}"
                shards.append(shard)
    return shards


def open_set(url: str, schema: str, expect_parents: Mapping[str, str] | None = None) -> ShardSet:
    """Open a finished shard set, and refuse one that is not what the caller needs.

    Args:
        url: place of the shard set.
        schema: IMAGE_SCHEMA or CODES_SCHEMA.
        expect_parents: kind -> content hash, of every parent that the caller has an opinion on.

    Raises:
        DataError: no manifest, another schema, or other parents.
    """
    stage = "prepare" if schema == IMAGE_SCHEMA else "encode"
    place = storage.join(url, MANIFEST)
    if not storage.exists(place):
        raise DataError(f"{url}: no shard set here ({MANIFEST} is missing); run the stage '{stage}' first, or run it again if it was interrupted.")
    manifest = storage.read_json(place)
    if manifest.get("schema") != schema:
        raise DataError(
            f"{url}: holds schema '{manifest.get('schema')}', this stage reads '{schema}'; "
            f"point data.images or data.codes at the right set, or run '{stage}' again."
        )
    for kind, expected in (expect_parents or {}).items():
        found = manifest["parents"].get(kind, "none")
        if found != expected:
            raise DataError(
                f"{url}: made from {kind} {found[:12]}, but this run uses {kind} {expected[:12]}; "
                f"delete {url} and run '{stage}' again, or go back to the {kind} it was made from."
            )
    return ShardSet(url, manifest)


def read_part(set_url: str, part: int) -> Iterator[dict[str, Any]]:
    """Records of one finished part in order, as dictionaries of columns. Every file is checked against its hash first.

    Raises:
        DataError: the part is not finished, or a file is missing or damaged.
    """
    place = storage.join(set_url, part_name(part))
    marker = read_marker(set_url, part)
    if marker is None:
        raise DataError(f"{place}: not finished; run the stage that writes {set_url} again.")
    if not storage.is_remote(place):
        yield from _read_local(storage.local_path(place), marker, place)
        return
    with tempfile.TemporaryDirectory(prefix="part-") as folder:
        for file in marker["files"]:
            storage.download_file(storage.join(place, file["name"]), Path(folder, file["name"]))
        yield from _read_local(Path(folder), marker, place)


def _read_local(folder: Path, marker: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    for file in marker["files"]:
        if storage.sha256_file(folder / file["name"]) != file["sha256"]:
            raise DataError(
                f"{storage.join(place, file['name'])}: damaged, its SHA-256 is not the one in {DONE}; delete {place} and run its stage again."
            )
    for shard in json.loads((folder / INDEX).read_text())["shards"]:
        reader = MDSReader.from_json(str(folder), None, shard)
        for index in range(len(reader)):
            yield reader[index]
