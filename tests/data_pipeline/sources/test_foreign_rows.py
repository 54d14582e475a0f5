"""Lines without end, metadata of tars that are not there, and further ids of an image: what no table of odd inputs shows."""

from __future__ import annotations

import gzip
import io
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import make_plan
from data_pipeline.sources.parquet import ParquetSource
from data_pipeline.sources.tar_metadata import lines_of
from infra.digests import id_hash
from tests.support.odd_inputs import FILTERS
from tests.support.odd_rows import picture, tar_of


class _Counted(io.BytesIO):
    """Counts how often it is read."""

    reads = 0

    def readline(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        return super().readline(size)

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        return super().read(size)


def taken(place: Path, **more: object) -> tuple[list[tuple[str, ...]], Tally]:
    data = DataConfig.model_validate({"sources": [{"url": str(place)}], **more}, strict=False)
    plan, tally = make_plan(data, FILTERS, 8, 0), Tally()
    return [tuple(record.captions) for unit in plan.units for record in parts.accepted(plan, unit, tally)], tally


@pytest.mark.parametrize("data", [b"\r" * 20_000, b"a\r" * 10_000, b"\r" * 2000 + b"\nb\r\n" + b"\r" * 64 + b"\n"])
def test_lone_carriage_returns_are_read_a_piece_at_a_time_and_none_is_lost(data: bytes) -> None:
    stream = _Counted(data)
    lines = list(lines_of(stream, 0, 1000))
    assert b"".join(line or b"" for _, line in lines) == data and [start for start, _ in lines] == sorted({start for start, _ in lines})
    assert stream.reads < 100 and not any(line.strip() for _, line in lines if line and b"a" not in line and b"b" not in line)


def test_lines_about_tars_that_are_not_there_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar_of(("c.png", picture(0)))(tmp_path)
    lines = [{"shard": shard, "file_name": "c.png", "caption": "a red cat"} for shard in ("x.tar", "y.tar", "y.tar", "z.tar")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level(logging.WARNING):
        assert taken(tmp_path)[0] == [("a red cat",)]
    assert "3 lines of its metadata*.jsonl are about 2 tars that are not there" in caplog.text


@pytest.mark.parametrize("gone", ["k1", "k2"])
def test_a_take_down_by_the_id_of_any_row_of_an_image_takes_it_down(tmp_path: Path, gone: str) -> None:
    place, list_of = tmp_path / "set", tmp_path / "takedown.txt"
    place.mkdir()
    (place / "0.png").write_bytes(picture(0))
    (place / "t.csv").write_text("image,caption,id\n0.png,a red cat,k1\n0.png,a blue cat,k2\n")
    list_of.write_text(f"{gone}\n")
    kept, tally = taken(place, takedown=str(list_of))
    assert kept == [] and tally.dropped["taken down"]["count"] == 1 and id_hash(gone) in tally.taken_down
    assert taken(place)[0] == [("a red cat", "a blue cat")]


@pytest.mark.parametrize(
    ("struct", "named"),
    [
        ({"bytes": 3, "path": "0.png"}, "bytes is of type int64"),
        ({"bytes": "0.png", "path": "0.png"}, "bytes is of type string"),
        ({"bytes": [1, 2], "path": "0.png"}, "bytes is of type list<element: int64>"),
        ({"bytes": None, "path": b"0.png"}, "path is of type binary"),
    ],
)
def test_structs_of_other_types_are_refused_by_file_and_column(tmp_path: Path, struct: dict[str, object], named: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [struct], "caption": ["a red cat"]}), tmp_path / "t.parquet")
    with pytest.raises(parts._Poisoned, match=f"t.parquet: in column 'image', a struct, {named}; accepted are bytes"):
        taken(tmp_path)


def test_a_struct_of_no_bytes_means_its_path(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    structs = [{"bytes": b"", "path": "0.png"}, {"bytes": None, "path": "1.png"}, {"bytes": b"", "path": None}]
    pyarrow.parquet.write_table(pyarrow.table({"image": structs, "caption": ["a red cat", "a cat", "a dog"]}), tmp_path / "t.parquet")
    kept, tally = taken(tmp_path)
    assert kept == [("a red cat",), ("a cat",)] and tally.dropped["missing image"]["count"] == 1


@pytest.mark.parametrize("data", [b"", b"x"])
def test_parquet_says_that_its_rows_name_images_where_bytes_may_be_empty(tmp_path: Path, data: bytes) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [{"bytes": data, "path": "0.png"}], "caption": ["a"]}), tmp_path / "t.parquet")
    (shard,) = ParquetSource(SourceConfig(url=str(tmp_path)), 8).shards()
    assert shard.names_images == (not data)


def test_what_is_wrong_with_a_zipped_table_is_said_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"first,second\na,b\n"))
    with pytest.raises(parts._Poisoned, match=r"t\.csv\.gz: its first row, first, second, names no column") as error:
        taken(tmp_path)
    assert f"{tmp_path}/t.csv.gz: its first row" in str(error.value)
