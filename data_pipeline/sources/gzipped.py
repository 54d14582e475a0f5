"""Tars and tables that are compressed with gzip, read as if they were not."""

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
    """A stream of the content if the URL's name says gzip and its first bytes do; else the stream itself.

    Raises:
        DataError: damaged or truncated (while reading, too).
    """
    if not url.lower().endswith((".gz", ".tgz")):
        yield stream
        return
    head = stream.read(len(_MAGIC))
    if head != _MAGIC:  # '.gz' in the name alone, as of downloads that unpacked it on their way
        yield cast(BinaryIO, io.BufferedReader(cast(Any, _Chained(head, stream)), _BUFFER))
        return
    with gzip.GzipFile(fileobj=cast(BinaryIO, io.BufferedReader(cast(Any, _Chained(head, stream)), _BUFFER))) as plain:
        yield cast(BinaryIO, io.BufferedReader(cast(Any, _Checked(plain, url)), _BUFFER))


class _Chained(io.RawIOBase):
    """Bytes that were read from a stream, and the rest of it."""

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
    """Turns the complaints of gzip into those of the pipeline."""

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
