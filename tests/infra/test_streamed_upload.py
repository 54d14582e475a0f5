"""Objects written from pieces: the same bytes, no copy on a disk, bounded memory, and no trace of one that broke off. About 5 s."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator

import pytest

from infra import s3 as objects
from infra import scratch, storage, streamed_upload
from infra.errors import DataError

PIECE = 5 << 20


def pieces(count: int) -> Iterator[bytes]:
    for index in range(count):
        yield bytes([index % 251]) * (PIECE + index)


def test_pieces_arrive_as_one_object_without_a_copy_on_the_disk(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_folder(prefix: str) -> None:
        raise AssertionError("a copy on the disk")

    monkeypatch.setattr(scratch, "folder", no_folder)
    size = sum(PIECE + index for index in range(9))
    streamed_upload.upload(pieces(9), size, f"{s3}/large")
    assert hashlib.sha256(storage.read_bytes(f"{s3}/large")).digest() == hashlib.sha256(b"".join(pieces(9))).digest()
    streamed_upload.upload(iter([b"a", b"", memoryview(b"bc")]), 3, f"{s3}/small")
    assert storage.read_bytes(f"{s3}/small") == b"abc"


def test_memory_is_bounded_by_the_parts_on_their_way(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 holds ten of them at once."""
    monkeypatch.setattr(objects, "PART_BYTES", 5 << 20)
    tracemalloc.start()
    streamed_upload.upload(pieces(32), sum(PIECE + index for index in range(32)), f"{s3}/long")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert storage.size(f"{s3}/long") > 160 << 20 and peak < 110 << 20, peak


def test_parts_grow_where_s3_would_take_no_more_of_them() -> None:
    assert objects._transfer(192 << 30).multipart_chunksize * 10_000 > 192 << 30, "a checkpoint of 12B parameters by one rank"
    assert objects._transfer(1 << 30).multipart_chunksize == objects.PART_BYTES == objects._transfer().multipart_chunksize


def test_an_error_of_the_source_leaves_no_object_and_no_parts(s3: str) -> None:
    def broken() -> Iterator[bytes]:
        yield from pieces(6)
        raise DataError("the tensor is gone")

    with pytest.raises(DataError, match="the tensor is gone"):
        streamed_upload.upload(broken(), 1 << 30, f"{s3}/broken")
    assert not storage.exists(f"{s3}/broken")
    assert objects.unfinished_uploads(s3) == []
