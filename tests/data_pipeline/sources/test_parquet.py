"""Parquet with embedded images, Hugging Face's structs, or paths; ranges of row groups; memory that does not grow with the file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources import arrow_rows
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import NotRead, Pair, Unreadable
from data_pipeline.sources.parquet import ParquetSource
from infra import storage
from infra.errors import DataError, UnreachableError
from tests.support import img2dataset


def write(path: Path, columns: dict[str, Any], group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def source_of(url: object, records: int = 1024, **settings: Any) -> ParquetSource:
    return ParquetSource(SourceConfig(url=str(url), **settings), records)


def read(source: ParquetSource, wanted: Callable[[str], bool] = lambda group: True) -> list[Pair | Unreadable]:
    return [found for shard in source.shards() for found in source.read(shard, wanted) if not isinstance(found, NotRead)]


def shown(found: list[Pair | Unreadable]) -> list[Any]:
    return [(item.image, *item.captions) if isinstance(item, Pair) else item.reason for item in found]


def embedded(path: Path) -> Path:
    columns = {"jpg": [b"0", b"1", None, b"3", b"4"], "caption": ["zero", "one", "two", None, " "], "group": ["a", "b", "b", "c", "d"]}
    return write(path, columns)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_embedded_images_are_read_by_row_groups(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    local = embedded(tmp_path / "train-0.parquet")
    if place == "s3":
        storage.upload_file(local, f"{url}/train-0.parquet")
    source = open_source(SourceConfig(url=url), DataConfig(records_per_part=2))
    assert isinstance(source, ParquetSource)
    assert [(shard.name, shard.span) for shard in source.shards()] == [(f"train-0.parquet@{n}", (n, n + 1)) for n in range(3)]
    found = read(source)
    assert found[0] == Pair("train-0.parquet/@0", ("zero",), b"0", url, "unknown", "a", "train")
    assert shown(found) == [(b"0", "zero"), (b"1", "one"), "missing image", "no caption", "no caption"]
    assert [item.id.rpartition("@")[2] for item in found] == list("01234")
    assert shown(read(source, lambda group: group == "b")) == [(b"1", "one"), "missing image", "no caption", "no caption"]


def test_row_groups_are_joined_up_to_the_number_of_records(tmp_path: Path) -> None:
    embedded(tmp_path / "a" / "x.parquet")
    embedded(tmp_path / "b.parquet")
    write(tmp_path / "empty.parquet", {"jpg": pyarrow.array([], pyarrow.binary()), "caption": pyarrow.array([], pyarrow.string())})
    assert [(shard.name, shard.span) for shard in source_of(tmp_path, 4).shards()] == [
        *(("a/x.parquet@0", (0, 2)), ("a/x.parquet@2", (2, 3)), ("b.parquet@0", (0, 2)), ("b.parquet@2", (2, 3)))
    ]


def test_hugging_faces_structs_hold_bytes_or_paths(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"there")
    images = [{"bytes": b"in", "path": "x.png"}, {"bytes": None, "path": "there.png"}, {"bytes": None, "path": None}, None]
    write(tmp_path / "x.parquet", {"image": images, "caption": [["a", "b"], ["c"], ["d"], ["e"]]})
    assert shown(read(source_of(tmp_path))) == [(b"in", "a", "b"), (b"there", "c"), "missing image", "missing image"]
    assert read(source_of(tmp_path), lambda group: False) == []


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.png").write_bytes(b"a")
    paths = ["a.png", str(tmp_path / "d" / "a.png"), "absent.png", "https://example.org/a.png", None]
    columns = {"image_path": paths, "texts": ["1", "2", "3", "4", "5"], "id": [10, 11, 12, 13, 14], "split": ["val"] * 5}
    write(tmp_path / "d" / "x.parquet", columns)
    found = read(source_of(tmp_path))
    assert shown(found) == [(b"a", "1"), (b"a", "2"), "missing image", "image is a web address", "missing image"]
    first = found[0]
    assert isinstance(first, Pair) and (first.id, first.group, first.split) == ("d/x.parquet/10", "image/a.png", "validation")
    dictionary = pyarrow.array(["a.png", "a.png"]).dictionary_encode()
    write(tmp_path / "d" / "y.parquet", {"image": dictionary, "caption": ["1", "2"]})
    assert shown(read(source_of(tmp_path / "d" / "y.parquet"))) == [(b"a", "1"), (b"a", "2")]


def test_the_parquet_of_img2dataset_is_read_and_failed_rows_are_counted(tmp_path: Path) -> None:
    img2dataset.parquet(tmp_path)
    source = open_source(SourceConfig(url=str(tmp_path)), DataConfig())
    found = read(source)  # type: ignore[arg-type]
    assert [item for item in found if isinstance(item, Unreadable)] == [Unreadable("00000.parquet/@1", "missing image")]
    rows = [row for row in img2dataset.ROWS if row.image]
    assert [pair for pair in found if isinstance(pair, Pair)] == [
        Pair(f"00000.parquet/{row.key}", (row.caption,), row.image or b"", str(tmp_path), "unknown", row.sha256 or "") for row in rows
    ]


def test_a_companion_of_img2dataset_is_not_taken_for_data(tmp_path: Path) -> None:
    img2dataset.webdataset(tmp_path)
    with pytest.raises(
        DataError, match=r"00000\.parquet: none of its columns, caption, url, .* hold images; it describes the tars or folders beside it"
    ):
        read(source_of(f"{tmp_path}/*.parquet"))


def test_columns_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"pixels": [b"1"], "caption": ["c"], "image": [1], "label": ["l"]})
    with pytest.raises(DataError, match=r"column 'image' is of type int64; accepted are bytes, strings \(paths\) and structs of bytes and path"):
        read(source_of(path))
    with pytest.raises(DataError, match=r"is known to hold images; columns are named in data.sources as image and captions"):
        read(source_of(path, image="picture"))
    with pytest.raises(DataError, match=r"is known to hold captions"):
        read(source_of(path, captions=("text",)))
    assert shown(read(source_of(path, image="pixels", captions=("label", "caption")))) == [(b"1", "l", "c")]


def test_only_the_columns_that_matter_are_read_and_images_of_unwanted_row_groups_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"image": [b"x" * 9] * 4, "caption": list("abcd"), "embedding": [os.urandom(9)] * 4, "sha256": list("abcd")}
    write(tmp_path / "x.parquet", columns)
    asked: list[tuple[list[int], list[str]]] = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def record(self: Any, size: int, row_groups: list[int], columns: list[str], **options: Any) -> Any:
        asked.append((row_groups, columns))
        return real(self, size, row_groups=row_groups, columns=columns, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", record)
    assert shown(read(source_of(tmp_path), lambda group: group == "d")) == [(b"x" * 9, "d")]
    assert asked == [([0], ["caption", "sha256"]), ([1], ["caption", "sha256"]), ([1], ["caption", "sha256", "image"])]


def test_a_broken_file_is_one_shard_that_fails_by_name_and_the_others_go_on(tmp_path: Path) -> None:
    good = embedded(tmp_path / "b.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    (tmp_path / "c.parquet").write_bytes(good[:200])
    source = source_of(tmp_path)
    shards = list(source.shards())
    assert [shard.name for shard in shards] == ["a.parquet@0", "b.parquet@0", "c.parquet@0"]
    for shard in (shards[0], shards[2]):
        with pytest.raises(DataError, match=rf"{shard.name[0]}\.parquet: not a Parquet file, or damaged \("):
            list(source.read(shard, lambda group: True))
    damaged = bytearray(good)
    damaged[4:120] = os.urandom(116)
    (tmp_path / "b.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"b\.parquet: not a Parquet file, or damaged"):
        list(source.read(shards[1], lambda group: True))
    write(tmp_path / "b.parquet", {"jpg": [b"1"], "caption": ["x"]})
    with pytest.raises(DataError, match=r"b\.parquet: has 1 row groups, 3 when it was listed; run again"):
        list(source.read(shards[1], lambda group: True))
    (tmp_path / "b.parquet").unlink()
    with pytest.raises(DataError, match=r"b\.parquet: does not exist"):
        list(source.read(shards[1], lambda group: True))


def test_strings_that_are_not_utf8_cost_their_row_alone(tmp_path: Path) -> None:
    bad = pyarrow.array([b"fine", b"\xff\xfe", b"too"], pyarrow.binary()).view(pyarrow.string())
    write(tmp_path / "x.parquet", {"jpg": [b"0", b"1", b"2"], "caption": bad}, 3)
    assert shown(read(source_of(tmp_path))) == [(b"0", "fine"), "not UTF-8", (b"2", "too")]


def test_an_image_above_the_limit_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "MAX_IMAGE_BYTES", 3)
    write(tmp_path / "x.parquet", {"jpg": [b"123", b"1234"], "caption": ["a", "b"]})
    assert shown(read(source_of(tmp_path))) == [(b"123", "a"), "image file too large"]


def test_memory_does_not_grow_with_a_row_group(tmp_path: Path) -> None:
    images = [os.urandom(1 << 16) for _ in range(600)]  # 37 MiB in one row group
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"image": images, "caption": ["c"] * 600})
    pyarrow.parquet.write_table(table, path, compression="none", data_page_size=1 << 18, write_batch_size=8)
    del table
    source, (before, most) = source_of(path), (pyarrow.total_allocated_bytes(), 0)
    (shard,) = source.shards()
    for number, pair in enumerate(source.read(shard, lambda group: True)):
        assert isinstance(pair, Pair) and pair.image == images[number]
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 12 << 20


def test_no_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .parquet file there; data.sources accepts a folder of them"):
        list(source_of(tmp_path).shards())


def test_a_network_that_fails_is_named_as_such(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.upload_file(embedded(tmp_path / "x.parquet"), f"{s3}/x.parquet")
    source = source_of(s3)
    shards = list(source.shards())

    def fail(self: object, buffer: object) -> int:
        raise UnreachableError("s3://x/x.parquet: failed after 6 attempts")

    monkeypatch.setattr("infra.objects.ObjectFile.readinto", fail)
    with pytest.raises(UnreachableError, match="failed after 6 attempts"):
        list(source.read(shards[0], lambda group: True))
    with pytest.raises(UnreachableError, match="failed after 6 attempts"):
        list(source_of(s3).shards())  # shards that are guessed in an outage would be others than those of the next start
