"""Transparent decompression of gzipped tars and tables."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from infra.errors import DataError

_MAGIC = b"\x1f\x8b"
_BUFFER = 1 << 18


@contextmanager
def unzipped(stream: BinaryIO, url: str) -> Iterator[BinaryIO]:
    """The decompressed stream if both the URL's suffix and the first bytes say gzip; else the stream itself.

    Raises:
        DataError: the data are damaged or truncated; may also be raised while reading.
    """
    if not url.lower().endswith((".gz", ".tgz")):
        yield stream
        return
    head = stream.read(len(_MAGIC))
    if head != _MAGIC:  # only the name says gzip, because the downloading program has unpacked it
        yield cast(BinaryIO, io.BufferedReader(cast(Any, _Chained(head, stream)), _BUFFER))
        return
    with gzip.GzipFile(fileobj=cast(BinaryIO, io.BufferedReader(cast(Any, _Chained(head, stream)), _BUFFER))) as plain:
        yield cast(BinaryIO, io.BufferedReader(cast(Any, _Checked(plain, url)), _BUFFER))


class _Chained(io.RawIOBase):
    """A stream that returns bytes which were already read from another stream, and then the rest of it."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


class _Checked(io.RawIOBase):
    """Turns errors of gzip into DataErrors."""

    def __init__(self, plain: gzip.GzipFile, url: str) -> None:
        self._plain, self._url = plain, url

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._plain.read(len(buffer))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{self._url}: damaged or truncated gzip data ({error}); fetch it again.") from error
        buffer[: len(data)] = data
        return len(data)
