"""Bounds on what pages of Parquet files unpack to. pyarrow takes the memory that the header of a page asks for, and copies a value of a dictionary into each row
that names it: a file of 4 kilobytes takes 12 gigabytes. The headers are looked at here as their bytes are read, before pyarrow sees them.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

from data_pipeline.sources.gzipped import FREE_BYTES, MOST_TIMES
from infra.errors import UnchangingError

MOST_VALUES = 1 << 25
"""Values of a column of lists in a row group; they take about 15 bytes each."""
_HEADER, _LONG_HEADER = 256, 1 << 16
_DEEPEST = 8
_DELTA_BYTE_ARRAY = 7
# Field numbers of parquet.thrift, from PageHeader on.
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_2 = 2, 3, 5, 7, 8
_NUM_VALUES, _ENCODING, _ENCODING_2 = 1, 2, 4


class WideError(Exception):
    """Rows may hold values so long that fewer of them must be read at once.

    Args:
        longest: bytes that a value may have.
    """

    def __init__(self, longest: int) -> None:
        super().__init__(f"values of up to {longest:,} bytes")
        self.longest = longest


@dataclass
class _Chunk:
    """A column of a row group."""

    name: str
    next: int
    """Where the next header is."""
    end: int
    left: int
    """Values that are still to come."""
    refused: str = ""
    """Why it is not read."""


class GuardedFile(io.RawIOBase):
    """A Parquet file for pyarrow, which checks the headers of the pages that pass by."""

    def __init__(self, stream: BinaryIO, url: str) -> None:
        super().__init__()
        self._stream, self._url = stream, url
        self._chunks: list[_Chunk] = []
        self._longest = 0

    def watch(self, row_group: Any, longest: int, lists: Collection[str] = ()) -> None:
        """Check the pages of a row group from here on.

        Args:
            row_group: its metadata.
            lists: paths of its columns with lists, in which a single row may have all values.
            longest: bytes that a value may have; 0: any number. A page may make longer ones from a dictionary, or from what values have in common.
        """
        self._longest, self._chunks = longest, []
        for column in map(row_group.column, range(row_group.num_columns)):
            begin, first = column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None
            begin = first if first and first < begin else begin  # as pyarrow finds it
            chunk = _Chunk(column.path_in_schema, begin, begin + column.total_compressed_size, column.num_values)
            if chunk.name in lists and chunk.left > MOST_VALUES:
                chunk.refused = (
                    f"column '{chunk.name}' has {chunk.left:,} values in lists in one row group, and accepted are {MOST_VALUES:,}, since a few bytes may "
                    "stand for all; if that is what it should hold, write the file anew with smaller row groups"
                )
            self._chunks.append(chunk)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def read(self, size: int | None = -1, /) -> bytes:
        """See RawIOBase.

        Raises:
            DataError: a page unpacks to far more than it is, or its header cannot be read.
            WideError: it may hold longer values than was said.
        """
        at = self._stream.tell() if self._chunks else 0
        data = self._stream.read(-1 if size is None else size)
        for chunk in self._chunks:
            while chunk.left > 0 and chunk.next < min(chunk.end, at + len(data)) and chunk.end > at:
                self._check(chunk, at, data)
        return data

    def _check(self, chunk: _Chunk, at: int, data: bytes) -> None:
        if chunk.refused:
            raise self._refused(chunk.refused)
        header, length = self._header(chunk, at, data)
        unpacked, packed = _whole(header.get(_UNPACKED)), _whole(header.get(_PACKED))
        if unpacked < 0 or packed < 0:
            raise self._refused(f"a page of column '{chunk.name}' has no size")
        if unpacked > max(FREE_BYTES, MOST_TIMES * packed):
            raise self._refused(
                f"a page of column '{chunk.name}' of {packed:,} bytes unpacks to {unpacked:,}; accepted are {MOST_TIMES} times its size, or {FREE_BYTES:,} "
                "bytes; if that is what it should hold, write the file anew with smaller pages or without compression"
            )
        data_page, data_page_2 = _fields(header.get(_DATA)), _fields(header.get(_DATA_2))
        repeats = _DICTIONARY in header or _DELTA_BYTE_ARRAY in (data_page.get(_ENCODING), data_page_2.get(_ENCODING_2))
        if repeats and self._longest and unpacked > self._longest:
            raise WideError(unpacked)
        values = max(0, _whole((data_page or data_page_2).get(_NUM_VALUES, 0)))
        if values > chunk.left:
            raise self._refused(f"a page of column '{chunk.name}' has {values:,} values, {chunk.left:,} are left of those that the file counts")
        chunk.left -= values
        chunk.next += length + packed

    def _header(self, chunk: _Chunk, at: int, data: bytes) -> tuple[dict[int, Any], int]:
        for length in (_HEADER, _LONG_HEADER):
            begin = chunk.next - at
            given = data[begin : begin + length] if begin >= 0 else b""
            if len(given) < length:
                given = self._elsewhere(chunk.next, length)
            try:
                return _struct(given, 0, 0)
            except (IndexError, ValueError):
                continue
        raise self._refused(f"the header of a page of column '{chunk.name}' cannot be read")

    def _refused(self, why: str) -> UnchangingError:
        return UnchangingError(f"{self._url}: not a Parquet file, or damaged ({why}).")

    def _elsewhere(self, at: int, length: int) -> bytes:
        back = self._stream.tell()
        try:
            self._stream.seek(at)
            return self._stream.read(length)
        finally:
            self._stream.seek(back)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _fields(value: Any) -> dict[int, Any]:
    return value if isinstance(value, dict) else {}


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol by field numbers, and where it ends. Text is passed over.

    Raises:
        IndexError, ValueError: it is none, or does not end here.
    """
    found: dict[int, Any] = {}
    number = 0
    while data[at]:
        kind, delta = data[at] & 15, data[at] >> 4
        at += 1
        if delta:
            number += delta
        else:
            number, at = _zigzag(data, at)
        found[number], at = _value(data, at, kind, depth, inside=False)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int, *, inside: bool) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if kind in (1, 2):  # true and false: in a struct the kind is the value
        return kind == 1, at + inside
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind in (3, 7):
        return None, at + (1 if kind == 3 else 8)
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        count, of = data[at] >> 4, data[at] & 15
        count, at = _varint(data, at + 1) if count == 15 else (count, at + 1)
        for _ in range(min(count, len(data) + 1)):  # each takes a byte or more
            _, at = _value(data, at, of, depth + 1, inside=True)
        return None, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise ValueError(f"kind {kind}")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 70:
            raise ValueError("a number without an end")
