"""Shard sets. A set consists of parts, whose MDS shards never change once written, and of versions, which say which parts and records belong to the set.

    <set>/part-<16 hex>/shard.00000.mds  index.json  ids.u64  [prints.u64  captions.jsonl.gz]  [further.u64]  done.json
    <set>/versions/<16 hex>/index.json  excluded.u64  manifest.json      one folder for each version, see data_pipeline/shards/versions.py
    <set>/index.json  manifest.json                                      copies of the newest version; manifest.json is the very last write

docs/contracts.md, section 3, specifies the format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import schema as schemas
from data_pipeline.shards.index import Shard, read_shards
from data_pipeline.shards.part_files import INDEX, U64, read_checked, read_records, read_row, read_u64, sha256_of, unpack_captions
from data_pipeline.shards.spellings import bases_of, read_takedown, spellings
from infra import storage
from infra.commands import launcher
from infra.digests import id_hash
from infra.errors import DataError, MissingError

T = TypeVar("T")

IMAGE_SCHEMA = "image/1"
CODES_SCHEMA = "codes/1"
MANIFEST = "manifest.json"
DONE = "done.json"
IDS = "ids.u64"
FURTHER = "further.u64"
"""Two numbers for each further row that says captions of an image: ``id_hash`` of the record, and of the row. Parts without such rows have no such file."""
PRINTS = "prints.u64"
CAPTIONS = "captions.jsonl.gz"
EXCLUDED = "excluded.u64"
VERSIONS = "versions"
_NAME_DIGITS = 16
_PARALLEL = 16  # small files that are read in parallel, because each may be a request to S3


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
    prints: tuple[int, int] = (0, 0)
    """Content hash and perceptual hash, 64 bits each, for the search for duplicates. Not a column."""
    further: tuple[int, ...] = ()
    """``id_hash`` of each further row that says captions of the image. Not a column."""

    schema = IMAGE_SCHEMA

    def columns(self) -> dict[str, str]:
        return dict(schemas.IMAGE_COLUMNS)


@dataclass(frozen=True)
class CodeRecord:
    """The codes of one crop of one image, schema codes/1."""

    id: str
    captions: list[str]
    codes: NDArray[np.uint16]
    """uint16 [grid * grid], row-major."""
    crop: dict[str, Any]
    """CropBox.to_json()."""
    crop_index: int
    seed: int
    further: tuple[int, ...] = ()
    """As of ImageRecord."""

    schema = CODES_SCHEMA

    def columns(self) -> dict[str, str]:
        return schemas.code_columns(self.codes.size)


Record = ImageRecord | CodeRecord


def part_name(inputs_hash: str) -> str:
    """Name of the folder of the part that is made from these inputs."""
    return f"part-{inputs_hash[:_NAME_DIGITS]}"


def read_marker(set_url: str, inputs_hash: str) -> dict[str, Any] | None:
    """The marker of the part that is made from these inputs; None if the part is not finished.

    Raises:
        DataError: it is damaged.
    """
    url = storage.join(set_url, part_name(inputs_hash), DONE)
    try:
        return schemas.read_marker_file(url)
    except MissingError:
        return None


def read_markers(set_url: str, inputs_hashes: list[str]) -> list[dict[str, Any] | None]:
    """Markers of many parts, read in parallel."""
    with ThreadPoolExecutor(_PARALLEL) as pool:
        return list(pool.map(lambda inputs: read_marker(set_url, inputs), inputs_hashes))


def part_done(set_url: str, inputs_hash: str) -> bool:
    """Whether the part that is made from these inputs is finished."""
    return storage.exists(storage.join(set_url, part_name(inputs_hash), DONE))


@dataclass(frozen=True)
class ShardSet:
    """An opened version of a shard set, without the records that were taken down."""

    url: str
    manifest: dict[str, Any]
    taken_ids: frozenset[str] = frozenset()
    """Ids on the take-down list, as paths relative to their source or absolute."""

    @property
    def stored(self) -> int:
        """Number of records in the shard files, whether visible or not."""
        return int(self.manifest["stored"])

    @property
    def content_hash(self) -> str:
        return str(self.manifest["content_hash"])

    @property
    def version_url(self) -> str:
        """Folder of this version's index, list of excluded records, and manifest."""
        return version_url(self.url, self.content_hash)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Name, source, count and files of each part, in order."""
        return list(self.manifest["parts"])

    @cached_property
    def count(self) -> int:
        """Number of visible records."""
        return self.stored - len(self.removed)

    @cached_property
    def shards(self) -> list[Shard]:
        """All shard files, in order.

        Raises:
            DataError: the index is missing or damaged, or does not match the manifest.
        """
        sources = {part["name"]: part["source"] for part in self.manifest["parts"]}
        return read_shards(storage.join(self.version_url, INDEX), str(self.manifest["schema"]), sources)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Position of each part's first record, followed by the number of stored records: int64 [parts + 1]."""
        return np.cumsum([0, *(part["count"] for part in self.parts)], dtype=np.int64)

    @cached_property
    def excluded(self) -> NDArray[np.int64]:
        """Sorted positions of stored records that do not belong to this version (duplicates, repeated ids).

        Raises:
            DataError: the file is missing or damaged.
        """
        facts = self.manifest["excluded"]
        if not facts["count"]:
            return np.empty(0, np.int64)
        url = storage.join(self.version_url, EXCLUDED)
        found = read_u64(url, facts["sha256"], facts["count"], once=True)
        if found[-1] >= self.stored or (found[1:] <= found[:-1]).any():
            raise DataError(f"{url}: damaged, its positions do not rise, or leave 0 to {self.stored - 1}; run '{launcher('validate', self.url)}'.")
        return found.astype(np.int64)

    @cached_property
    def taken_down(self) -> NDArray[np.int64]:
        """Sorted positions of the records whose ids are on the take-down list, or the id of a further row that says captions of the same image."""
        if not self.taken_ids:
            return np.empty(0, np.int64)
        listed = spellings(self.taken_ids, bases_of(self.manifest.get("settings") or {}))
        wanted = np.array(sorted(id_hash(identity) for identity in listed), U64)
        found = []
        for part, (ids, further) in enumerate(zip(self.id_hashes(), self.further_ids(), strict=True)):
            named = np.union1d(wanted, further[np.isin(further[:, 1], wanted), 0]) if len(further) else wanted
            found.append(np.flatnonzero(np.isin(ids, named)) + self.starts[part])
        return np.concatenate(found) if found else np.empty(0, np.int64)

    @cached_property
    def removed(self) -> NDArray[np.int64]:
        """Sorted positions of all records that are not visible, because they are excluded or taken down."""
        return np.union1d(self.excluded, self.taken_down) if len(self.taken_down) else self.excluded

    def removed_rows(self, part: int) -> NDArray[np.int64]:
        """The rows of one part that are not visible."""
        begin, end = np.searchsorted(self.removed, self.starts[part : part + 2])
        return self.removed[begin:end] - self.starts[part]

    def id_hashes(self) -> list[NDArray[np.uint64]]:
        """``id_hash`` of every stored record, as one array for each part.

        Raises:
            DataError: a file is missing or damaged.
        """
        return list(self._side_files(IDS, 1, once=True))

    def further_ids(self) -> list[NDArray[np.uint64]]:
        """``id_hash`` of a record and of a further row that says captions of the same image: uint64 [rows, 2] for each part.

        Raises:
            DataError: a file is missing or damaged.
        """
        return list(self._each_part(self.further_ids_of, range(len(self.parts))))

    def further_ids_of(self, part: int) -> NDArray[np.uint64]:
        """As ``further_ids``, of one part."""
        entry = self.parts[part]
        rows = sum(file["bytes"] for file in entry["files"] if file["name"] == FURTHER) // 16
        return self._side_file(entry, FURTHER, 2 * rows, once=True).reshape(-1, 2)

    def named_ids(self) -> list[NDArray[np.uint64]]:
        """``id_hash`` of all ids by which a take-down list may name stored records, as one or two arrays for each part."""
        return [*self.id_hashes(), *(further[:, 1] for further in self.further_ids() if len(further))]

    def prints(self) -> list[NDArray[np.uint64]]:
        """Content hash, perceptual hash and hash of the group of every stored image: uint64 [count, 3] for each part."""
        return [values.reshape(-1, 3) for values in self._side_files(PRINTS, 3)]

    def group_hashes(self) -> Iterator[NDArray[np.uint64]]:
        """Group hash of every stored image, part by part; only a few parts are in memory at a time.

        Raises:
            DataError: a file is missing or damaged.
        """
        for values in self._side_files(PRINTS, 3):
            yield values.reshape(-1, 3)[:, 2]

    def _side_files(self, name: str, numbers: int, *, once: bool = False) -> Iterator[NDArray[np.uint64]]:
        return self._each_part(lambda part: self._side_file(part, name, numbers * part["count"], once=once), self.parts)

    def _side_file(self, part: dict[str, Any], name: str, count: int, *, once: bool) -> NDArray[np.uint64]:
        found = [file["sha256"] for file in part["files"] if file["name"] == name]
        return read_u64(storage.join(self.url, part["name"], name), found[0], count, once=once) if found else np.empty(0, U64)

    def _each_part(self, read: Callable[[T], NDArray[np.uint64]], parts: Sequence[T]) -> Iterator[NDArray[np.uint64]]:
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for begin in range(
                0, len(parts), _PARALLEL
            ):  # in groups, because with all parts at once the pool would read ahead of a slow consumer without limit
                yield from pool.map(read, parts[begin : begin + _PARALLEL])

    def records(self) -> Iterator[dict[str, Any]]:
        """All visible records, part by part, in order."""
        for part in range(len(self.parts)):
            yield from self.read_part(part)

    def read_part(self, part: int) -> Iterator[dict[str, Any]]:
        """The visible records of one part in order, as dictionaries of columns. Every file is verified against its hash first.

        Raises:
            DataError: a file is missing or damaged.
        """
        entry, hidden = self.parts[part], set(self.removed_rows(part).tolist())
        for row, record in enumerate(read_records(self.url, entry, str(self.manifest["schema"]))):
            if row not in hidden:
                yield record

    def captions(self) -> Iterator[list[str]]:
        """Captions of all visible images, in order; no image is read.

        Raises:
            DataError: a file is missing or damaged.
        """
        for part, entry in enumerate(self.parts):
            if not entry["count"]:
                continue
            hidden = set(self.removed_rows(part).tolist())
            place = storage.join(self.url, entry["name"], CAPTIONS)
            limit = sum(file["bytes"] for file in entry["files"] if file["name"] == CAPTIONS)
            data = read_checked(place, sha256_of(entry, CAPTIONS, self.url), limit)
            for row, captions in enumerate(unpack_captions(data, entry["count"], place)):
                if row not in hidden:
                    yield captions

    def rows_at(self, positions: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """The stored records at some positions, visible or not, in the given order. Only their own bytes are read, with two small reads a record.

        Raises:
            DataError: a file is missing, truncated, or damaged at such a position.
        """
        shards = self.shards
        ends_S = np.cumsum([shard.samples for shard in shards], dtype=np.int64)

        def read(position: int) -> dict[str, Any]:
            number = int(np.searchsorted(ends_S, position, side="right"))
            if number == len(shards):
                raise DataError(
                    f"{self.version_url}: its index has {len(ends_S) and ends_S[-1]} records, the manifest {self.stored}: damaged; run 'launcher.py validate' on the set."
                )
            shard = shards[number]
            return read_row(storage.join(self.url, shard.basename), shard.entry, position - int(ends_S[number]) + shard.samples)

        with ThreadPoolExecutor(_PARALLEL) as pool:
            return list(pool.map(read, (int(position) for position in positions)))


def version_url(set_url: str, content_hash: str) -> str:
    """Folder of one version.

    Raises:
        DataError: ``content_hash`` is not a hash.
    """
    return storage.join(set_url, VERSIONS, schemas.version_folder(content_hash, _NAME_DIGITS))


def open_set(url: str, schema: str, expect_parents: Mapping[str, str] | None = None, version: str = "", takedown: str = "") -> ShardSet:
    """Open a version of a shard set; a set with another schema or other parents than expected is refused.

    Args:
        url: place of the shard set.
        schema: IMAGE_SCHEMA or CODES_SCHEMA.
        expect_parents: kind -> content hash, for every parent that must match.
        version: content hash of the version; empty: the newest.
        takedown: URL of the take-down list (data.takedown); empty: none.

    Raises:
        DataError: there is no such version, its manifest is damaged, its schema or parents are others, or the take-down list does not exist.
    """
    stage = "prepare" if schema == IMAGE_SCHEMA else "encode"
    place = storage.join(version_url(url, version) if version else url, MANIFEST)
    try:
        manifest = schemas.read_manifest(place, once=bool(version))
    except MissingError:
        what = f"no version {version[:_NAME_DIGITS]} of a shard set" if version else "no shard set"
        raise DataError(
            f"{url}: {what} here ({MANIFEST} is missing); run the stage '{stage}' first, or run it again if it was interrupted."
        ) from None
    if manifest["schema"] != schema:
        raise DataError(
            f"{url}: holds schema '{manifest['schema']}', this stage reads '{schema}'; "
            f"point data.images or data.codes at the right set, or run '{stage}' again."
        )
    for kind, expected in (expect_parents or {}).items():
        found = manifest["parents"].get(kind, "none")
        if found != expected:
            raise DataError(
                f"{url}: made from {kind} {found[:12]}, but this run uses {kind} {expected[:12]}; "
                f"run '{stage}' again for this run, or go back to the {kind} it was made from."
            )
    return ShardSet(url, manifest, read_takedown(takedown))
