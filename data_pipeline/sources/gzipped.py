"""Transparent decompression of gzipped tars and tables."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from infra.errors import DataError, UnchangingError

_MAGIC = b"\x1f\x8b"
_BUFFER = 1 << 18
MOST_TIMES = 100
"""A gzipped file may unpack to this many times its size. Captions do to 3 to 20 times; a few kilobytes of hostile data would to terabytes."""
FREE_BYTES = 64 << 20
"""What unpacks to no more than this is not measured against its size."""


@contextmanager
def unzipped(stream: BinaryIO, url: str) -> Iterator[BinaryIO]:
    """The decompressed stream if both the URL's suffix and the first bytes say gzip; else the stream itself.

    Raises:
        DataError: the data are damaged or truncated, or unpack to far more than they are; may also be raised while reading.
    """
    if not url.lower().endswith((".gz", ".tgz")):
        yield stream
        return
    head = stream.read(len(_MAGIC))
    if head != _MAGIC:  # only the name says gzip, because the downloading program has unpacked it
        yield cast(BinaryIO, io.BufferedReader(cast(Any, _Chained(head, stream)), _BUFFER))
        return
    packed = _Chained(head, stream)
    with gzip.GzipFile(fileobj=cast(BinaryIO, io.BufferedReader(cast(Any, packed), _BUFFER))) as plain:
        yield cast(BinaryIO, io.BufferedReader(cast(Any, _Checked(plain, packed, url)), _BUFFER))


class _Chained(io.RawIOBase):
    """A stream that returns bytes which were already read from another stream, and then the rest of it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest
        self.bytes = 0
        """How many were read."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        self.bytes += len(data)
        buffer[: len(data)] = data
        return len(data)


class _Checked(io.RawIOBase):
    """Turns errors of gzip into DataErrors, and ends what unpacks to far more than it is."""

    def __init__(self, plain: gzip.GzipFile, packed: _Chained, url: str) -> None:
        self._plain, self._packed, self._url = plain, packed, url
        self._bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._plain.read(min(len(buffer), _BUFFER))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self._url}: damaged or truncated gzip data ({error}); fetch it again.") from error
        self._bytes += len(data)
        if self._bytes > max(FREE_BYTES, MOST_TIMES * self._packed.bytes):
            raise UnchangingError(
                f"{self._url}: its first {self._packed.bytes:,} bytes unpack to more than {self._bytes:,}; accepted are {MOST_TIMES} times the size of a "
                f"gzipped file, or {FREE_BYTES:,} bytes. If that is what it should hold, unpack it (gunzip) and name the plain file."
            )
        buffer[: len(data)] = data
        return len(data)
