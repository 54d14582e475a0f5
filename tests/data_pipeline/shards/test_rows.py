"""The fast reader of rows: the values of streaming's own reader, and no damage unseen."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming import MDSWriter
from streaming.base.format.mds.reader import MDSReader

from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.rows import ShardRows, check_file
from data_pipeline.shards.shard_set import CodeRecord, ImageRecord, Record
from infra.errors import DataError

TEXT = st.text(max_size=20)
CODES = st.lists(st.integers(0, 65535), min_size=4, max_size=4).map(lambda codes: np.array(codes, np.uint16))
INT64 = st.integers(-(2**63), 2**63 - 1)
CODE = st.builds(CodeRecord, TEXT, st.lists(TEXT, min_size=1), CODES, st.dictionaries(TEXT, st.integers()), INT64, INT64)
IMAGE = st.builds(ImageRecord, TEXT, st.lists(TEXT, min_size=1), st.binary(max_size=50), INT64, INT64, TEXT, TEXT, TEXT, TEXT)


def write(folder: Path, records: Sequence[Record], shard_bytes: int = 1 << 26) -> list[dict[str, Any]]:
    write_part(str(folder), "00000", records, shard_bytes)
    entries: list[dict[str, Any]] = json.loads((folder / "part-00000" / "index.json").read_text())["shards"]
    return entries


def open_rows(folder: Path, entry: dict[str, Any]) -> ShardRows:
    return ShardRows(folder / "part-00000" / entry["raw_data"]["basename"], entry, "NAME")


@given(st.one_of(st.lists(CODE, min_size=1, max_size=6), st.lists(IMAGE, min_size=1, max_size=6)))
def test_rows_are_those_of_streaming(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    folder = tmp_path_factory.mktemp("set")
    for entry in write(folder, records, 300):
        theirs, ours = MDSReader.from_json(str(folder / "part-00000"), None, entry), open_rows(folder, entry)
        assert len(theirs) == len(ours)
        for index in range(len(theirs)):
            row, expected = ours[index], theirs[index]
            assert set(row) == set(expected) == set(records[0].columns()) and len(row) == len(expected)
            for name, value in expected.items():
                if isinstance(value, np.ndarray):
                    assert row[name].dtype == value.dtype and row[name].tolist() == value.tolist() and not row[name].flags.writeable
                else:
                    assert type(row[name]) is type(value) and row[name] == value


def test_arrays_of_several_axes_are_read(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    with MDSWriter(out=str(tmp_path), columns={"x": "ndarray:int32:2,3,4"}, hashes=["xxh64"]) as writer:
        writer.write({"x": values})
    (entry,) = json.loads((tmp_path / "index.json").read_text())["shards"]
    assert np.array_equal(ShardRows(tmp_path / "shard.00000.mds", entry, "NAME")[0]["x"], values)


def test_a_column_that_is_not_asked_for_is_not_decoded(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, [CodeRecord("a", ["x"], np.zeros(4, np.uint16), {"box": 1}, 0, 0)])
    path = tmp_path / "part-00000" / "shard.00000.mds"
    path.write_bytes(path.read_bytes().replace(b'{"box": 1}', b'{"box": 1\xff'))
    row = open_rows(tmp_path, entry)[0]
    assert row["captions"] == ["x"]
    with pytest.raises(DataError, match=r"NAME, row 0: damaged, column 'crop' of a row does not decode \(.*0xff"):
        row["crop"]
    with pytest.raises(KeyError):
        row["pixels"]


RECORDS = [CodeRecord(f"id-{number}", ["x"] * number, np.zeros(4, np.uint16), {}, 0, 0) for number in range(5)]


def test_a_file_that_is_no_shard_of_its_entry_is_refused(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, RECORDS)
    path = tmp_path / "part-00000" / "shard.00000.mds"
    data = path.read_bytes()
    for wrong in (b"", data[:3], data[:10], data[:-1], b"\0" * len(data), data + b"x", b"\x06" + data[1:], data[:8] + b"\xff\xff" + data[10:]):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=rf"NAME: damaged, it is no MDS file of 5 rows in {len(data)} bytes \(it has {len(wrong)}\)"):
            open_rows(tmp_path, entry)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        open_rows(tmp_path, entry)
    path.mkdir()
    with pytest.raises(DataError, match=r"NAME: cannot be read \(Is a directory\)"):
        open_rows(tmp_path, entry)


def test_a_row_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, RECORDS)
    path = tmp_path / "part-00000" / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    begin = int.from_bytes(data[4 + 8 : 4 + 12], "little")  # of row 2
    data[begin] ^= 1
    path.write_bytes(data)
    rows = open_rows(tmp_path, entry)
    assert rows[1]["id"] == "id-1"
    with pytest.raises(DataError, match=r"NAME, row 2: damaged, the columns of a row are \d+ bytes, the row \d+"):
        rows[2]
    path.write_bytes(path.read_bytes()[: begin + 3])  # cut short behind our back
    with pytest.raises(DataError, match=r"NAME, row 2: damaged, a row is too short"):
        rows[2]


def test_a_file_that_fails_later_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = write(tmp_path, RECORDS)
    rows = open_rows(tmp_path, entry)

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(DataError, match=r"NAME: cannot be read \(Input/output error\)"):
        rows[0]


def test_formats_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, RECORDS)
    with pytest.raises(DataError, match=r"NAME: format 'json', compression 'None'; expected uncompressed 'mds'"):
        open_rows(tmp_path, entry | {"format": "json"})
    with pytest.raises(DataError, match=r"compression 'zstd'"):
        open_rows(tmp_path, entry | {"compression": "zstd"})
    encodings = ["pkl", *entry["column_encodings"][1:]]
    with pytest.raises(
        DataError, match=r"NAME: column 'captions' has encoding 'pkl'; accepted are str, bytes, json, int and ndarray:<dtype>:<shape>"
    ):
        open_rows(tmp_path, entry | {"column_encodings": encodings})


def test_a_closed_file_is_given_back(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, RECORDS)
    path = str(tmp_path / "part-00000" / "shard.00000.mds")

    def held() -> int:
        return [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")].count(path)

    rows = open_rows(tmp_path, entry)
    assert held() == 1
    rows.close()
    rows.close()
    assert held() == 0


def test_a_file_that_cannot_be_read_is_named_when_it_is_checked(tmp_path: Path) -> None:
    (entry,) = write(tmp_path, RECORDS)
    assert check_file(tmp_path / "part-00000" / "shard.00000.mds", entry, "NAME") == ""
    with pytest.raises(DataError, match=r"NAME: cannot be read \(Is a directory\)"):
        check_file(tmp_path, entry, "NAME")
