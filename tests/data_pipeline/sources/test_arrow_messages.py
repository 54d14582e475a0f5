"""Arrow files of a few kilobytes that would take gigabytes are refused before memory is taken. About 3 s."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.sources.arrow import ArrowSource
from data_pipeline.sources.arrow_messages import check_messages
from data_pipeline.sources.pairs import NotRead, Pair
from infra.errors import DataError

MB = 1 << 20


def packed(table: Any, *, seekable: bool, compression: str | None = "zstd", rows: int = 1 << 20) -> bytes:
    buffer = io.BytesIO()
    make = pyarrow.ipc.new_file if seekable else pyarrow.ipc.new_stream
    with make(buffer, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, rows)
    return buffer.getvalue()


def read(path: Path) -> list[Any]:
    source = ArrowSource(SourceConfig(url=str(path)))
    return [found for shard in source.shards() for found in source.read(shard, lambda group: True) if not isinstance(found, NotRead)]


@pytest.mark.parametrize("seekable", [False, True])
@pytest.mark.parametrize("dictionary", [False, True])
def test_a_batch_that_unpacks_to_far_more_than_it_is_is_refused(*, seekable: bool, dictionary: bool, tmp_path: Path) -> None:
    captions = pyarrow.array(["x" * (100 * MB)])
    table = pyarrow.table({"image": [b"i"], "caption": captions.dictionary_encode() if dictionary else captions})
    (tmp_path / "a.arrow").write_bytes(packed(table, seekable=seekable))
    assert (tmp_path / "a.arrow").stat().st_size < MB
    with pytest.raises(DataError, match=r"a batch of [0-9,]+ bytes unpacks to 104,857,\d+; accepted are 100 times its size, or 67,108,864 bytes"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("seekable", [False, True])
@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_usual_files_pass(*, seekable: bool, compression: str | None, tmp_path: Path) -> None:
    captions = [f"a caption {number % 70}" for number in range(300)]
    for column in (pyarrow.array(captions), pyarrow.array(captions).dictionary_encode()):
        table = pyarrow.table({"image": [b"image %d" % number * 9 for number in range(300)], "caption": column, "id": [None, *range(299)]})
        (tmp_path / "a.arrow").write_bytes(packed(table, seekable=seekable, compression=compression, rows=64))
        found = read(tmp_path / "a.arrow")
        assert all(isinstance(record, Pair) for record in found) and [record.captions[0] for record in found] == captions


@pytest.mark.parametrize("seekable", [False, True])
def test_damaged_metadata_end_in_a_sentence_and_soon(*, seekable: bool) -> None:
    table = pyarrow.table({"image": [b"i"] * 50, "caption": pyarrow.array(["x", "y"] * 25).dictionary_encode()})
    whole, draw = packed(table, seekable=seekable, rows=10), random.Random(0)
    refused = 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        try:
            check_messages(io.BytesIO(bytes(data)), len(data), seekable=seekable)
        except ValueError:
            refused += 1
    assert refused > 100
