"""A fast reader of rows in MDS shard files: one read for each row, and a column is decoded only when it is needed. No streaming, no torch.

Files are read and not memory-mapped: with a mapping, a failing disk or a truncated file would end the process with SIGBUS and without a message.

An MDS file is little-endian: uint32 n, n + 1 uint32 offsets, a JSON header, the rows. A row holds the sizes (uint32) of its columns of variable size, then all
columns. The supported encodings are those of our records: str, bytes, json, int, and ndarray with dtype and shape.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.shards import links
from infra import shown, strict_json
from infra.errors import DataError

HASH = "xxh64"
"""The hash of shard files in an index, by the name that streaming gives it."""
_CHUNK = 1 << 20

Decoder = Callable[[bytes], Any]


def check_file(path: Path, entry: Mapping[str, Any], name: str) -> str:
    """What is wrong with a shard file, in words; '' if it has the size and hash of its index entry.

    Raises:
        DataError: the entry has no hash, or the file cannot be read; messages call the file ``name``.
    """
    raw = entry["raw_data"]
    expected = raw["hashes"].get(HASH)
    if expected is None:
        raise DataError(f"{name}: its index entry has no {HASH} hash, so damage would not be seen; write the set again with this project's stages.")
    found, size = xxhash.xxh64(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                found.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror}).") from error
    if size != raw["bytes"]:
        return f"{size} bytes instead of {raw['bytes']}"
    return "" if found.hexdigest() == expected else f"its {HASH} is {found.hexdigest()} instead of {expected}"


@dataclass(frozen=True)
class _Layout:
    """The layout of a file's rows."""

    columns: dict[str, tuple[int, Decoder]]
    """Name of a column -> its position in a row, and its decoder."""
    sizes: tuple[int, ...]
    """Size of each column in bytes; 0 for a variable size."""
    variable: tuple[int, ...]
    """Positions of the columns of variable size."""
    head: struct.Struct
    """The head of a row, which holds the sizes of these columns."""


class Row(Mapping[str, Any]):
    """One record; a column is decoded when it is accessed. Arrays are read-only."""

    __slots__ = ("_data", "_ends", "_layout", "_name")

    def __init__(self, data: bytes, layout: _Layout, name: Callable[[], str]) -> None:
        self._data, self._layout, self._name = data, layout, name
        try:
            found = layout.head.unpack_from(data)
        except struct.error as error:
            raise DataError(f"{name()}: damaged, a row is too short.") from error
        sizes = list(layout.sizes)
        for place, size in zip(layout.variable, found, strict=True):
            sizes[place] = size
        self._ends = list(accumulate(sizes, initial=layout.head.size))
        if self._ends[-1] != len(data):
            raise DataError(f"{name()}: damaged, the columns of a row are {self._ends[-1]} bytes, the row {len(data)}.")

    def __getitem__(self, column: str) -> Any:
        place, decode = self._layout.columns[column]
        try:
            return decode(self._data[self._ends[place] : self._ends[place + 1]])
        except ValueError as error:
            raise DataError(f"{self._name()}: damaged, column '{column}' of a row does not decode ({error}).") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.columns)

    def __len__(self) -> int:
        return len(self._layout.columns)


def row_decoder(entry: Mapping[str, Any], name: str) -> Callable[[bytes], Row]:
    """A function that decodes the bytes of one row, for callers that fetch single rows with a range request. It raises DataError if the bytes are damaged.

    Args:
        entry: the shard's entry in the index.
        name: name of the shard in messages.

    Raises:
        DataError: a column has an unknown encoding.
    """
    layout = _layout(entry, name)
    return lambda data: Row(data, layout, lambda: name)


class ShardRows:
    """Random access to the rows of one shard file."""

    def __init__(self, path: Path, entry: Mapping[str, Any], name: str) -> None:
        """
        Args:
            path: the file, which must have been verified with ``check_file``, because rows are not verified again.
            entry: its entry in the index.
            name: name of the file in messages.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: the file does not match its entry, or has a column with an unknown encoding.
        """
        self._name, self._samples = name, int(entry["samples"])
        self._layout = _layout(entry, name)
        links.check(str(path))
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.pread(self._file, 4 * (self._samples + 2), 0)
            size = os.fstat(self._file).st_size
        except OSError as error:
            self.close()
            raise DataError(f"{name}: cannot be read ({error.strerror}).") from error
        numbers = np.frombuffer(head[: len(head) // 4 * 4], "<u4")
        offsets = numbers[1:].astype(np.int64)
        whole = len(numbers) == self._samples + 2 and numbers[0] == self._samples
        if not (whole and offsets[0] >= len(head) and (np.diff(offsets) >= 0).all() and offsets[-1] == size == entry["raw_data"]["bytes"]):
            self.close()
            raise DataError(f"{name}: damaged, it is no MDS file of {self._samples} rows in {entry['raw_data']['bytes']} bytes (it has {size}).")
        self._offsets: list[int] = offsets.tolist()

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, row: int) -> Row:
        """
        Raises:
            DataError: the file can no longer be read, or the row is damaged.
        """
        begin, end = self._offsets[row], self._offsets[row + 1]
        try:
            data = os.pread(self._file, end - begin, begin)
        except OSError as error:
            raise DataError(f"{self._name}: cannot be read ({error.strerror}).") from error
        return Row(data, self._layout, lambda: f"{self._name}, row {row}")

    def close(self) -> None:
        """Close the file; may be called more than once."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


def _layout(entry: Mapping[str, Any], name: str) -> _Layout:
    if entry.get("format") != "mds" or entry.get("compression"):
        raise DataError(f"{name}: format '{entry.get('format')}', compression '{entry.get('compression')}'; expected uncompressed 'mds'.")
    columns, sizes = {}, []
    for place, (column, encoding) in enumerate(zip(entry["column_names"], entry["column_encodings"], strict=True)):
        decode, size = _decoder(encoding, column, name)
        decode = _MEANINGS.get((column, encoding), decode)
        columns[column] = (place, decode)
        sizes.append(size)
    variable = tuple(place for place, size in enumerate(sizes) if not size)
    return _Layout(columns, tuple(sizes), variable, struct.Struct(f"<{len(variable)}I"))


def _decoder(encoding: str, column: str, name: str) -> tuple[Decoder, int]:
    """The decoder of a column, and its size in bytes (0: it varies)."""
    if encoding in _PLAIN:
        return _PLAIN[encoding]
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray" and rest.count(":") == 1:
        words, shape = rest.split(":")
        sides = tuple(int(side) for side in shape.split(",") if side.isdecimal())
        if words in _NUMBERS and sides and len(sides) == shape.count(",") + 1 and 0 < math.prod(sides) < 1 << 32:
            dtype = np.dtype(words).newbyteorder("<")
            if len(sides) == 1:
                return (lambda data: np.frombuffer(data, dtype)), dtype.itemsize * sides[0]
            return (lambda data: np.frombuffer(data, dtype).reshape(sides)), dtype.itemsize * math.prod(sides)
    raise DataError(f"{name}: column '{column}' has encoding '{encoding}'; accepted are {', '.join(_PLAIN)} and ndarray:<dtype>:<shape>.")


def _captions(data: bytes) -> list[str]:
    found = strict_json.loads_record(data.decode())
    if type(found) is not list or not found or not all(type(caption) is str for caption in found):
        raise ValueError(f"{shown.value(found, 80)} where a list of texts belongs")
    return found


def _box(data: bytes) -> dict[str, Any]:
    found = strict_json.loads_record(data.decode())
    if type(found) is not dict:
        raise ValueError(f"{shown.value(found, 80)} where a crop box belongs")
    return found


_MEANINGS: dict[tuple[str, str], Decoder] = {("captions", "json"): _captions, ("crop", "json"): _box}
"""Decoders of columns whose values stages use without a check, so that wrong values (captions that are not a list of texts) never reach training."""
_NUMBERS = tuple(f"{kind}{bits}" for kind in ("uint", "int", "float") for bits in (8, 16, 32, 64) if (kind, bits) != ("float", 8))
_PLAIN: dict[str, tuple[Decoder, int]] = {
    "str": (lambda data: data.decode(), 0),
    "bytes": (lambda data: data, 0),
    "json": (lambda data: strict_json.loads_record(data.decode()), 0),
    "int": (lambda data: int.from_bytes(data, "little", signed=True), 8),
}
