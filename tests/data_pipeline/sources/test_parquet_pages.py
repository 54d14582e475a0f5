"""Parquet files of a few kilobytes that would take gigabytes are refused, or read row by row, before memory is taken. About 4 s."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.sources import parquet
from data_pipeline.sources.pairs import NotRead, Pair
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.parquet_pages import _struct
from infra.errors import DataError

MB = 1 << 20


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", **options)
    return path


def read(path: Path) -> list[Any]:
    source = ParquetSource(SourceConfig(url=str(path)), 1024)
    return [found for shard in source.shards() for found in source.read(shard, lambda group: True) if not isinstance(found, NotRead)]


def test_a_page_that_unpacks_to_far_more_than_it_is_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"image": [b"\0" * (100 * MB)], "caption": ["x"]}, use_dictionary=False)
    assert path.stat().st_size < MB
    with pytest.raises(
        DataError, match=r"a page of column 'image' of [0-9,]+ bytes unpacks to 104,\d+,\d+; accepted are 100 times its size, or 67,108,864"
    ):
        read(path)
    allowed = written(tmp_path / "b.parquet", {"image": [b"\0" * (30 * MB)], "caption": ["x"]}, use_dictionary=False)
    assert isinstance(read(allowed)[0], Pair)


def test_a_value_that_many_rows_name_is_not_copied_for_all_of_them_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary of one caption of 1 MB and 64 rows that name it."""
    monkeypatch.setattr(parquet, "_AT_ONCE", 4 * MB)
    rows = 64
    captions = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array(["x " * (MB // 2)]))
    images = [bytes([number]) for number in range(rows)]
    path = written(tmp_path / "a.parquet", {"image": images, "caption": captions}, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < MB // 10
    sizes: list[int] = []
    found = pyarrow.parquet.ParquetFile.iter_batches

    def noted(self: Any, rows: int, **more: Any) -> Any:
        sizes.append(rows)
        return found(self, rows, **more)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", noted)
    tracemalloc.start()
    number = 0
    source = ParquetSource(SourceConfig(url=str(path)), 1024)
    for shard in source.shards():
        for record in source.read(shard, lambda group: True):
            assert isinstance(record, Pair) and record.image == images[number] and len(record.captions[0]) == MB - 1
            number += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == rows and sizes[-1] == 3, "as many as fit into 4 MB"
    assert peak < 20 * MB


def test_rows_that_were_read_before_a_wide_page_come_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of one encoding make long values from what values have in common; such a page may come late."""
    monkeypatch.setattr(parquet, "_AT_ONCE", 1 << 20)
    monkeypatch.setattr(parquet, "READ_BYTES", 4096)
    short, long = (
        [hashlib.sha256(bytes([number % 256, number // 256])).hexdigest() for number in range(2000)],
        ["y" * 40_000 + str(number) for number in range(100)],
    )
    columns = {"image": [b"x"] * 2100, "caption": short + long}
    path = written(
        tmp_path / "a.parquet",
        columns,
        use_dictionary=False,
        column_encoding={"caption": "DELTA_BYTE_ARRAY"},
        data_page_size=4096,
        write_batch_size=64,
    )
    assert [record.captions[0] for record in read(path)] == short + long


def test_the_pages_of_usual_files_pass_whatever_their_encoding_and_version(tmp_path: Path) -> None:
    images, captions = [b"image %d" % number * 40 for number in range(3000)], [f"a caption {number % 700}" for number in range(3000)]
    table = pyarrow.table({"image": images, "caption": captions})
    plain = {"use_dictionary": False}
    options: list[dict[str, Any]] = [
        {},
        plain,
        {"data_page_version": "2.0"},
        {"data_page_size": 1000, "write_statistics": True},
        {"row_group_size": 100},
    ]
    options += [{"compression": "snappy"}, {"compression": "none"}, plain | {"column_encoding": {"caption": "DELTA_LENGTH_BYTE_ARRAY"}}]
    for given in options:
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", **given)
        assert [(record.image, record.captions[0]) for record in read(tmp_path / "a.parquet")] == list(zip(images, captions, strict=True))


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x15", b"\x15" + b"\xff" * 20, b"\x1c" * 100, b"\x19\xfc\xff\xff\xff\x7f", b"\x1d\x00"])
def test_what_is_no_header_ends_in_an_error_that_the_reader_knows(data: bytes) -> None:
    with pytest.raises((IndexError, ValueError)):
        _struct(data, 0, 0)
