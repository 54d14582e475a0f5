"""Uploads of objects whose content is produced piece by piece. On S3 this needs no copy on disk, and in memory only the parts that are being sent."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from infra import objects, s3


class Pieces(io.RawIOBase):
    """A file that reads from an iterator of pieces. It is not seekable, so boto3 copies one part at a time into memory, from where it can send it again."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        super().__init__()
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """See RawIOBase."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        length = min(len(buffer), len(self._rest))
        buffer[:length] = self._rest[:length]
        self._rest = self._rest[length:]
        return length


def upload(pieces: Iterator[bytes | memoryview], size: int, url: str) -> None:
    """Write an object of ``size`` bytes; it appears once all of it has arrived. An exception from the iterator ends the upload and is raised here."""
    with io.BufferedReader(Pieces(pieces), s3.PART_BYTES) as source:
        objects.store(url).upload(source, url, size)
