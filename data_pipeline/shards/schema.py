"""The fields of a shard set's manifests, indexes and markers. Each file is checked against them when it is opened, before anything is read, written or deleted
by what it says.

A set may come from anybody. Names in it are single path components, so that nothing outside the set is ever read, written or deleted. Encodings are limited to
ours, so that nothing in it is executed (MDS has an encoding ``pkl``) or unpacked without a bound (MDS has compressed shards). Every field is typed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, FailFast, Field, model_validator

from data_pipeline.shards import links
from infra import node_folder
from infra.errors import DataError
from infra.stored import Count, Sha256, Stored, check, read

PART = r"part-[0-9a-f]{1,64}"
"""Names of parts, as ``part_name`` makes them."""
IMAGE_COLUMNS = {
    **dict.fromkeys(("id", "source", "license", "group", "split"), "str"),
    "captions": "json",
    "image": "bytes",
    "width": "int",
    "height": "int",
}
"""Columns of schema image/1 -> their encodings."""
_FILE = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}"
_SHARD = rf"{_FILE}\.mds"
_VERSION = re.compile(r"[0-9a-f]{1,64}")
_TEXT = r"^[^\x00]{0,4096}$"
PIECE = 4096
"""Rows that are checked together."""
_WRITTEN_AGAIN = "run 'launcher.py validate' on the set, which says what to delete and to run"


class File(Stored):
    """A file of a part."""

    name: Annotated[str, Field(pattern=f"^{_FILE}$")]
    bytes: Count
    sha256: Sha256


def _part_name(name: str) -> str:
    if not re.fullmatch(PART, name):
        raise ValueError("expected part-<hexadecimal digits>: it was changed by hand, or is damaged")
    return name


class Part(Stored):
    """The entry of a part in the manifest."""

    name: Annotated[str, AfterValidator(_part_name)]
    source: Annotated[str, Field(pattern=_TEXT)]
    count: Count
    files: Annotated[list[File], FailFast()]


class Excluded(Stored):
    """Which stored records do not belong to the version."""

    count: Count
    sha256: Sha256
    reasons: dict[str, Count] = Field(default_factory=dict)


class Manifest(Stored):
    """manifest.json of a set: at its top, and in the folder of each version."""

    schema_: Annotated[str, Field(alias="schema", pattern=r"^[a-z]+/[0-9]{1,9}$")]
    count: Count
    stored: Count
    content_hash: Sha256
    parts: Annotated[list[Part], FailFast()]
    """A name may occur twice: two equal parts of images, such as two empty ones, share one part of codes."""
    excluded: Excluded
    parents: dict[str, Annotated[str, Field(pattern=_TEXT)]]
    settings: dict[str, Any]
    producer: dict[str, Any] = Field(default_factory=dict)


class RawData(Stored):
    """The file of a shard, in the index of a part."""

    basename: Annotated[str, Field(pattern=f"^{_SHARD}$")]
    bytes: Count
    hashes: dict[str, str]


class RawDataInSet(RawData):
    """The file of a shard, in the index of a set."""

    basename: Annotated[str, Field(pattern=f"^{PART}/{_SHARD}$")]


class Entry(Stored):
    """A shard in the index of a part."""

    column_names: list[Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]]
    column_encodings: list[Annotated[str, Field(pattern=r"^(str|bytes|json|int|ndarray:uint16:[1-9][0-9]{0,6})$")]]
    format: Literal["mds"]
    compression: None = None
    samples: Count
    raw_data: RawData

    @model_validator(mode="after")
    def _one_encoding_a_column(self) -> Self:
        if len(self.column_names) != len(self.column_encodings) or len(set(self.column_names)) < len(self.column_names):
            raise ValueError("each column has one name and one encoding")
        if 4 * self.samples > self.raw_data.bytes:
            raise ValueError(f"{self.samples} rows do not fit into {self.raw_data.bytes} bytes")
        return self


class EntryInSet(Entry):
    """A shard in the index of a set."""

    raw_data: RawDataInSet


class PartIndex(Stored):
    """index.json of a part."""

    shards: Annotated[list[Entry], FailFast()]


class Index(Stored):
    """index.json of a set."""

    shards: Annotated[list[EntryInSet], FailFast()]


class Marker(Stored):
    """done.json of a part."""

    inputs: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    count: Count
    files: Annotated[list[File], FailFast()]
    shards: Annotated[list[Entry], FailFast()]
    extra: dict[str, Any]


def code_columns(length: int) -> dict[str, str]:
    """Columns of schema codes/1 -> their encodings, for pictures of ``length`` codes."""
    return {"id": "str", "captions": "json", "codes": f"ndarray:uint16:{length}", "crop": "json", "crop_index": "int", "seed": "int"}


def columns_of(schema: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """Column -> encoding of a shard with this schema. The number of codes is taken from the index entry."""
    if schema.startswith("image/"):
        return IMAGE_COLUMNS
    encodings = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    length = str(encodings.get("codes", "")).rpartition(":")[2]
    return code_columns(int(length) if length.isdecimal() else 0)


def check_columns(schema: str, entry: Mapping[str, Any], place: str) -> None:
    """Refuse a shard whose columns are not those of the schema, before any record is read.

    Raises:
        DataError: they differ; the message names the first such column.
    """
    found, expected = dict(zip(entry["column_names"], entry["column_encodings"], strict=True)), columns_of(schema, entry)
    if found != expected:
        odd = min(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise DataError(f"{place}: column '{odd}' is {found.get(odd)}, the schema has {expected.get(odd)}; run 'launcher.py validate' on the set.")


def read_manifest(url: str, *, once: bool = False) -> dict[str, Any]:
    """The manifest of a set or of one of its versions.

    Args:
        once: of a version, which never changes: the ranks of a node fetch it once.

    Raises:
        DataError: it is missing or damaged, or names a part or file outside the set; then nothing may be read, written or deleted by it.
    """
    return _read(url, Manifest, once=once, table="parts")


def read_index(url: str) -> list[dict[str, Any]]:
    """The shards in the index of a version, which never changes: the ranks of a node fetch it once.

    Raises:
        DataError: it is missing or damaged, names a file outside the set, or has columns that would execute code when they are read.
    """
    return list(_read(url, Index, once=True, table="shards")["shards"])


def read_part_index(url: str) -> list[dict[str, Any]]:
    """The shards in the index of a part; see ``read_index``."""
    return list(_read(url, PartIndex)["shards"])


def read_marker_file(url: str) -> dict[str, Any]:
    """The marker of a part.

    Raises:
        DataError: it is damaged.
    """
    return _read(url, Marker, f"delete the folder {url.rpartition('/')[0]} and run the stage that wrote it again")


def _read(url: str, model: type[Stored], remedy: str = _WRITTEN_AGAIN, *, once: bool = False, table: str = "") -> dict[str, Any]:
    """A file, checked. The rows of a ``table``, of which a large set has a hundred thousand, are checked in pieces, so that what checking takes is small."""
    links.check(url)
    if not once:
        return read(url, model, remedy)
    found: dict[str, Any] = node_folder.json_once(url, alike=True)
    rows = found.get(table) if isinstance(found, dict) else None
    if not isinstance(rows, list) or len(rows) <= PIECE:
        check(found, model, url, remedy)
        return found
    for begin in range(0, len(rows), PIECE):
        check_piece({**found, table: rows[begin : begin + PIECE]}, model, url, table, begin, remedy)
    return found


def check_piece(found: dict[str, Any], model: type[Stored], url: str, table: str, begin: int, remedy: str = _WRITTEN_AGAIN) -> None:
    """Check a file of whose ``table`` only the rows from ``begin`` on are there.

    Raises:
        DataError: it does not match the description.
    """
    check(found, model, f"{url}: {table} from {begin} on" if begin else url, remedy)


def version_folder(content_hash: str, digits: int) -> str:
    """Name of a version's folder.

    Raises:
        DataError: it is not the beginning of a content hash (a name such as '..' would lead out of the set).
    """
    if not _VERSION.fullmatch(content_hash):
        raise DataError(f"version '{content_hash}': expected the hexadecimal digits of a content hash, as 'launcher.py inspect' shows them.")
    return content_hash[:digits]
