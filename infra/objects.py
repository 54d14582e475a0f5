"""Chooses the module that serves a remote URL: ``infra/s3.py`` for S3, ``infra/cloud.py`` for Google's and Azure's storage."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from infra import cloud, s3

SCHEMES = ("s3", "gs", "az")
"""Schemes of remote URLs."""


class Objects(Protocol):
    """The functions that a module for an object store offers, which ``infra/s3.py`` documents.

    Every function raises DataError for an object that is missing or damaged, UnreachableError if the server does not answer after retries, and ConfigError for
    a missing bucket or refused credentials. A written object appears whole or not at all.
    """

    def bucket_and_key(self, url: str) -> tuple[str, str]: ...
    def read(self, url: str, most: int | None = None) -> bytes: ...
    def read_range(self, url: str, start: int, size: int) -> bytes: ...
    def download(self, url: str, local: Path, sha256: str) -> None: ...
    def ObjectStream(self, url: str, start: int = 0) -> io.RawIOBase: ...
    def write(self, url: str, data: bytes) -> None: ...
    def upload(self, source: IO[bytes], url: str, size: int = 0) -> None: ...
    def create_once(self, url: str, data: bytes) -> bool: ...
    def check_creation(self, url: str) -> None: ...
    def head(self, url: str) -> dict[str, Any] | None: ...
    def list_names(self, url: str) -> list[str]: ...
    def list_objects(self, url: str, start: str = "", *, shallow: bool = False) -> Iterator[tuple[str, int, str]]: ...
    def is_folder(self, url: str) -> bool: ...
    def delete(self, url: str) -> None: ...
    def delete_all(self, url: str) -> None: ...


def store(url: str) -> Objects:
    """The module that serves a remote URL."""
    return s3 if url.startswith("s3://") else cloud  # type: ignore[return-value]


class ObjectFile(io.RawIOBase):
    """An object as a file with random access. Each read is one range request, so read large pieces or add a buffer."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__()
        self._url, self._size, self._position = url, size, 0
        self._read_range = store(url).read_range

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """See RawIOBase; transfers that break off are retried.

        Raises:
            DataError: it cannot be read, even after retries.
        """
        length = max(0, min(len(buffer), self._size - self._position))
        data = self._read_range(self._url, self._position, length) if length else b""
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)
