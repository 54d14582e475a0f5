"""Rows of Parquet and Arrow files that name a long value many times, or have lists of endless nothing: counted drops, and no gigabytes. About 3 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_pipeline.config import SourceConfig
from data_pipeline.sources import arrow_sizes
from data_pipeline.sources.arrow import ArrowSource
from data_pipeline.sources.arrow_sizes import pieces, row_bytes
from data_pipeline.sources.pairs import NotRead, Pair, Unreadable
from data_pipeline.sources.parquet import ParquetSource
from infra.errors import DataError

MB = 1 << 20
LONG = "x " * (MB // 2 - 1) + "y"


def words(indices: list[int], values: list[Any]) -> Any:
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array(indices, pyarrow.int32()), pyarrow.array(values))


def lists(offsets: list[int], values: Any) -> Any:
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, pyarrow.int32()), values)


def read(form: str, path: Path, columns: dict[str, Any]) -> list[Any]:
    table = pyarrow.table(columns)
    source: Any
    if form == "parquet":
        pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)
        source = ParquetSource(SourceConfig(url=str(path)), 1024)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
        source = ArrowSource(SourceConfig(url=str(path)))
    return [found for shard in source.shards() for found in source.read(shard, lambda group: True) if not isinstance(found, NotRead)]


@pytest.mark.parametrize("inside", ["strings", "structs"])
@pytest.mark.parametrize("form", ["parquet", "feather"])
def test_a_list_that_names_a_long_caption_a_thousand_times_is_one_counted_record(form: str, inside: str, tmp_path: Path) -> None:
    said = words([0] * 1002, [LONG])
    said = said if inside == "strings" else pyarrow.StructArray.from_arrays([said], ["raw"])
    own = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    usual = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(own)
    try:
        found = read(form, tmp_path / f"a.{form}", {"image": [b"a", b"b", b"c"], "captions": lists([0, 1, 1001, 1002], said)})
    finally:
        pyarrow.set_memory_pool(usual)
    assert [type(each) for each in found] == [Pair, Unreadable, Pair] and found[1].reason == "text too long"
    assert [record.captions for record in (found[0], found[2])] == [(LONG,), (LONG,)]
    assert own.max_memory() < 200 * MB, "a thousand copies are a gigabyte"


def test_pages_that_stand_for_endless_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.sources.parquet_pages.MOST_VALUES", 1000)
    said = lists([0, 1, 1001], pyarrow.nulls(1001, pyarrow.string()))
    with pytest.raises(
        DataError,
        match=r"a\.parquet: .*column 'captions\.list\.element' has 1,001 values in lists in one row group, and accepted are 1,000.*smaller row",
    ):
        read("parquet", tmp_path / "a.parquet", {"image": [b"a", b"b"], "captions": said})
    fine = lists([0, 1, 1000], pyarrow.array(["a cat"] * 1000))
    unread = lists([0, 1, 1001], pyarrow.array([1.0] * 1001))
    assert len(read("parquet", tmp_path / "b.parquet", {"image": [b"a", b"b"], "captions": fine, "embedding": unread})) == 2


def test_rows_of_arrow_files_that_name_one_long_value_are_copied_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_sizes, "_AT_ONCE", 4 * MB)
    sizes = []
    found = arrow_sizes.pieces

    def noted(batch: Any, image: str) -> Any:
        for piece, reason in found(batch, image):
            sizes.append(piece.num_rows)
            yield piece, reason

    monkeypatch.setattr("data_pipeline.sources.arrow_rows.pieces", noted)
    captions = words([0] * 32, [LONG])
    records = read("feather", tmp_path / "a.feather", {"image": [bytes([number]) for number in range(32)], "caption": captions})
    assert [record.image[0] for record in records] == list(range(32)) and {record.captions for record in records} == {(LONG,)}
    assert max(sizes) == 3, "as many as fit into 4 MB"


def test_fields_of_an_image_that_are_not_read_take_nothing_and_images_in_dictionaries_have_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    junk = lists([0, 1, 10_000_001], pyarrow.nulls(10_000_001))
    image = pyarrow.StructArray.from_arrays([pyarrow.array([b"a", None]), pyarrow.array([None, "b.png"]), junk], ["bytes", "path", "junk"])
    first, second = read("feather", tmp_path / "a.feather", {"image": image, "caption": ["a cat", "a dog"]})
    assert first.image == b"a" and second.reason == "missing image"
    monkeypatch.setattr(arrow_sizes, "MAX_IMAGE_BYTES", 1000)
    batch = pyarrow.record_batch({"image": words([0, 1], [b"a", b"b" * 2000]), "caption": ["a cat", "a dog"]})
    assert [(piece.num_rows, reason) for piece, reason in pieces(batch, "image")] == [(1, ""), (1, "image file too large")]


def test_columns_of_captions_that_name_values_over_and_over_in_other_ways_are_refused(tmp_path: Path) -> None:
    runs = pyarrow.RunEndEncodedArray.from_arrays(pyarrow.array([2], pyarrow.int32()), pyarrow.array(["a cat"]))
    views = pyarrow.ListViewArray.from_arrays(
        pyarrow.array([0, 0], pyarrow.int32()), pyarrow.array([1, 1], pyarrow.int32()), pyarrow.array(["a cat"])
    )
    inside = pyarrow.StructArray.from_arrays([pyarrow.array(["a cat"] * 2), views], ["caption", "more"])
    for captions, name in ((runs, "captions"), (views, "captions"), (inside, r"captions\.more")):
        with pytest.raises(
            DataError, match=rf"column '{name}' is of type (run_end|list_view).*; accepted are strings, lists of strings, and structs"
        ):
            read("feather", tmp_path / "a.feather", {"image": [b"a", b"b"], "captions": captions})


def test_sizes_are_those_of_the_values_whatever_their_layout_also_in_slices() -> None:
    texts = ["a" * 1000, None, "", "b" * 3000]
    parts = pyarrow.array([["a" * 500, "b" * 500], None, [], ["c" * 3000]])
    fixed = pyarrow.array([["a" * 500, "b" * 500], None, ["", ""], ["c" * 2000, "d" * 1000]], pyarrow.list_(pyarrow.string(), 2))
    arrays = [pyarrow.array(texts, kind) for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view())]
    arrays += [pyarrow.array(texts).dictionary_encode(), pyarrow.array([text and text.encode() for text in texts]), parts, fixed]
    arrays += [parts.cast(pyarrow.large_list(pyarrow.string())), pyarrow.StructArray.from_arrays([pyarrow.array(texts)], ["raw"])]
    for array in arrays:
        for begin in (0, 1, 3):
            sizes = row_bytes(array.slice(begin)) // 1000
            assert sizes.tolist() == [1, 0, 0, 3][begin:], array.type
    assert row_bytes(pyarrow.array([1, None])).tolist() == row_bytes(pyarrow.nulls(2)).tolist() == [64, 64]
    endless = lists([0, 1, 10_000_001], pyarrow.nulls(10_000_001))
    assert row_bytes(endless).tolist() == [128, 640_000_000] and len(row_bytes(pyarrow.array([], pyarrow.list_(pyarrow.string())))) == 0
    assert np.array_equal(row_bytes(words([0, 0], ["ab"])), row_bytes(pyarrow.array(["ab", "ab"])))
