"""Bounds on what the messages of Arrow files unpack to. Each compressed buffer says in its first bytes how long it is without compression, and pyarrow takes that
memory before it unpacks: the sizes are looked at here first. Of the metadata, which are flatbuffers, only what leads to the buffers is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from data_pipeline.sources.gzipped import FREE_BYTES, MOST_TIMES

_LOOK = 1 << 12
_CONTINUES = 0xFFFFFFFF
_FIRST, _TRAILER = 8, 10
"""Bytes before the first message of a file, and those behind its footer: a length and the magic word."""
_DICTIONARY, _BATCH = 2, 3
# Field numbers of Message.fbs, Schema.fbs and File.fbs.
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3
_BUFFERS, _COMPRESSION = 2, 3
_DATA = 1
_DICTIONARIES, _BATCHES = 2, 3


def check_messages(stream: BinaryIO, size: int, *, seekable: bool) -> None:
    """Look at all batches of a file.

    Args:
        seekable: the form with a footer, which says where batches are; else they follow each other.

    Raises:
        ValueError: one unpacks to far more than it is, or the metadata are damaged.
    """
    try:
        if seekable:
            for at in _footer(stream, size):
                if at < size:
                    _check(stream, at, size)
            return
        following: int | None = 0
        while following is not None and following < size:
            following = _check(stream, following, size)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"its metadata cannot be read: {error}") from None


def _footer(stream: BinaryIO, size: int) -> Iterator[int]:
    (length,) = struct.unpack_from("<i", _read(stream, size - _TRAILER, _TRAILER))
    if not 0 < length <= size - _TRAILER - _FIRST:
        raise ValueError("it has no footer")
    footer = _read(stream, size - _TRAILER - length, length)
    root = _unsigned(footer, 0)
    for field in (_DICTIONARIES, _BATCHES):
        begin, count = _vector(footer, _field(footer, root, field))
        for number in range(count):
            yield struct.unpack_from("<q", footer, begin + 24 * number)[0]


def _check(stream: BinaryIO, at: int, size: int) -> int | None:
    """Look at a message; returns where the next one is, or None behind the last."""
    head = _read(stream, at, _LOOK)
    first = 8 if _unsigned(head, 0) == _CONTINUES else 4
    length = _unsigned(head, first - 4)
    if not length:
        return None
    if length > size - at:
        raise ValueError("a message is longer than the file")
    meta = head[first : first + length] if first + length <= len(head) else _read(stream, at + first, length)
    root, body = _unsigned(meta, 0), at + first + length
    packed_at = _field(meta, root, _BODY_LENGTH)
    packed = struct.unpack_from("<q", meta, packed_at)[0] if packed_at else 0
    kind_at, table = _field(meta, root, _HEADER_TYPE), _table(meta, _field(meta, root, _HEADER))
    kind = meta[kind_at] if kind_at else 0
    if kind == _DICTIONARY:
        table = _table(meta, _field(meta, table, _DATA))
    if packed < 0:
        raise ValueError("a message has no size")
    if kind in (_DICTIONARY, _BATCH) and _field(meta, table, _COMPRESSION):
        begin, count = _vector(meta, _field(meta, table, _BUFFERS))
        unpacked = 0
        for number in range(count):
            offset, long = struct.unpack_from("<qq", meta, begin + 16 * number)
            if long > 0:
                (claimed,) = struct.unpack("<q", _read(stream, body + offset, 8))
                unpacked += long if claimed < 0 else claimed  # -1: this one is not compressed
        if unpacked > max(FREE_BYTES, MOST_TIMES * packed):
            raise ValueError(
                f"a batch of {packed:,} bytes unpacks to {unpacked:,}; accepted are {MOST_TIMES} times its size, or {FREE_BYTES:,} bytes; if that is what it "
                "should hold, write the file anew with smaller batches or without compression"
            )
    return body + packed


def _read(stream: BinaryIO, at: int, length: int) -> bytes:
    if at < 0:
        raise ValueError("a place before the beginning")
    stream.seek(at)
    return stream.read(length)


def _unsigned(data: bytes, at: int) -> int:
    found: int = struct.unpack_from("<I", data, at)[0]
    return found


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a table is; 0 if it has none."""
    names = table - struct.unpack_from("<i", data, table)[0]
    if names < 0 or 6 + 2 * number > struct.unpack_from("<H", data, names)[0]:
        return 0
    offset: int = struct.unpack_from("<H", data, names + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _table(data: bytes, field: int) -> int:
    return field + _unsigned(data, field)


def _vector(data: bytes, field: int) -> tuple[int, int]:
    """Where the entries of a vector begin, and how many there are."""
    if not field:
        return 0, 0
    begin = field + _unsigned(data, field)
    return begin + 4, min(_unsigned(data, begin), len(data))
