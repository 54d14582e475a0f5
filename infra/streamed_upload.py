"""An object written from pieces that are made one after another: on S3 no copy on a disk, and in memory no more than the parts on their way."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from infra import objects, s3


class Pieces(io.RawIOBase):
    """Reads an iterator of pieces as one file. Not seekable, so boto3 takes a part at a time into memory, and sends it again from there if it must."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        super().__init__()
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As of RawIOBase."""
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
    """Put an object of ``size`` bytes; it appears when all of it has arrived. What the iterator raises ends the upload and comes out here."""
    with io.BufferedReader(Pieces(pieces), s3.PART_BYTES) as source:
        objects.store(url).upload(source, url, size)
