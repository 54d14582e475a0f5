"""What strangers' sources hold that nobody meant for us: each costs its own record, cell or file, is counted with its reason, and nothing more. About 4 s."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources import gzipped
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import NotRead, Pair, Unreadable
from data_pipeline.sources.tar_metadata import lines_of
from infra.errors import DataError
from tests.data_pipeline.sources.test_accounting import archive, in_tar, pair, picture, plan_of, reasons


def found_in(url: object, **settings: Any) -> tuple[list[Pair], Counter[str], Counter[str]]:
    """The pairs of a source, its unreadable records by reason, and what it passed over."""
    source = open_source(SourceConfig(url=str(url), **settings), DataConfig())
    found = [item for shard in source.shards() for item in source.read(shard, lambda group: True)]
    passed = Counter(source.census.not_read)
    for item in found:
        if isinstance(item, NotRead):
            passed[item.suffix] += item.count
    bad = Counter(item.reason for item in found if isinstance(item, Unreadable))
    return [item for item in found if isinstance(item, Pair)], bad, passed


def pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))


# --- Tars ---------------------------------------------------------------------------------------------------------------------------------


def test_links_devices_and_pipes_among_the_members_of_a_tar_are_counted(tmp_path: Path) -> None:
    out = io.BytesIO()
    kinds = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "char": tarfile.CHRTYPE, "block": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE}
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, data in pair("a"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        for name, kind in {**kinds, "folder": tarfile.DIRTYPE}.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.type, info.linkname = kind, "a.png" if name in ("link", "hard") else ""
            file.addfile(info)
        info = tarfile.TarInfo("odd.png")
        info.type, info.size = b"V", 3
        file.addfile(info, io.BytesIO(b"xyz"))
        for name, data in pair("b", 1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    kept, tally = in_tar(tmp_path, out.getvalue())
    assert kept == tally.seen == 2
    assert tally.not_read == {"(link)": 1, "(hard link)": 1, "(device)": 2, "(pipe)": 1, "(of an unknown kind)": 1}
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as file:  # two members a record; folders hold nothing themselves
        assert 2 * kept + tally.not_read.total() == sum(not member.isdir() for member in file.getmembers())


def test_a_record_whose_image_is_a_link_is_dropped_and_the_link_is_counted(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.LNKTYPE, "../elsewhere.png"
        file.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        file.addfile(info, io.BytesIO(b"a cat"))
    kept, tally = in_tar(tmp_path, out.getvalue())
    assert (kept, reasons(tally), tally.not_read) == (0, {"missing image": 1}, {"(hard link)": 1})


# --- Tables -------------------------------------------------------------------------------------------------------------------------------


def table(suffix: str, rows: list[tuple[str, str]], end: str) -> str:
    if suffix == "jsonl":
        return "".join(json.dumps({"image": image, "caption": caption}) + end for image, caption in rows)
    mark = "," if suffix == "csv" else "\t"
    return "".join(f"{image}{mark}{caption}{end}" for image, caption in [("image", "caption"), *rows])


@pytest.mark.parametrize("records", [1, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_row_ends_at_either_end_of_a_line(suffix: str, end: str, records: int, tmp_path: Path) -> None:
    pictures(tmp_path, 8)
    rows = [(f"{number % 8}.png", f"a red cat number {number} upon a table" + " and more" * number) for number in range(16)]
    (tmp_path / f"t.{suffix}").write_text(table(suffix, rows, end), newline="")
    plan = plan_of(tmp_path / f"t.{suffix}", records_per_part=records)
    assert (len(plan.units) > 3) == (records == 1), "and ranges begin where rows do"
    found = [item for unit in plan.units for item in plan.sources[0].read(unit.shard, lambda group: True)]
    captions = {item.captions for item in found if isinstance(item, Pair)}
    assert captions == {(rows[number][1], rows[number + 8][1]) for number in range(8)} and len(found) == 8


def test_lines_of_every_end_are_found_wherever_a_read_ends() -> None:
    lines = [b"a", b"", b"bc\r", b"d\r\n", b"\r", b"\n", b"\r\n", b"ef\n", b"longer than the limit\r", b"x\r", b"y\r\n", b"z"]
    text = b"".join(lines)
    expected = [(0, b"abc\r"), (4, b"d\r\n"), (7, b"\r\n"), (9, b"\r\n"), (11, b"ef\n"), (14, None), (36, b"x\r"), (38, b"y\r\n"), (41, b"z")]
    for size in range(5, 12):
        assert list(lines_of(io.BytesIO(text), 0, size)) == expected


def test_a_carriage_return_within_quotes_stays_in_its_caption(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "t.csv").write_text('image,caption\r0.png,"one\rtwo"\r1.png,three\r', newline="")
    found, bad, _ = found_in(tmp_path / "t.csv")
    assert [item.captions for item in found] == [("one\rtwo",), ("three",)] and not bad


@pytest.mark.parametrize("header", ["image,caption,caption", "image,image,caption", "id,id,image,caption"])
@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_a_column_that_comes_twice_is_refused_by_its_name(header: str, mark: str, tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    name = "t.tsv" if mark == "\t" else "t.csv"
    (tmp_path / name).write_text(header.replace(",", mark) + "\n" + mark.join(["0.png"] * (header.count(",") + 1)) + "\n")
    twice = header.split(",")[2 if header.startswith("image,caption") else 0]
    with pytest.raises(DataError, match=rf"{name}: 2 of its columns are called '{twice}', and which one is meant cannot be told; rename the others"):
        found_in(tmp_path / name)


def test_a_column_that_nobody_reads_may_come_twice(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    (tmp_path / "t.csv").write_text("image,caption,note,note\n0.png,a cat,x,y\n")
    assert [item.captions for item in found_in(tmp_path / "t.csv")[0]] == [("a cat",)]


@pytest.mark.parametrize("form", ["jsonl", "json beside the image", "json in a tar"])
def test_a_json_key_that_comes_twice_costs_its_record(form: str, tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    odd, good = '{"image": "0.png", "caption": "first", "caption": "second"}', '{"image": "1.png", "caption": "a cat"}'
    if form == "jsonl":
        (tmp_path / "t.jsonl").write_text(f"{odd}\n{good}\n")
    elif form == "json in a tar":
        members = [
            (f"{number}.{suffix}", data) for number, text in enumerate((odd, good)) for suffix, data in (("png", picture(0)), ("json", text.encode()))
        ]
        (tmp_path / "x.tar").write_bytes(archive(members))
    else:
        (tmp_path / "0.json").write_text(odd)
        (tmp_path / "1.json").write_text(good)
    found, bad, _ = found_in(tmp_path / {"jsonl": "t.jsonl", "json in a tar": "x.tar"}.get(form, ""))
    assert [item.captions for item in found] == [("a cat",)] and bad == {"json key twice": 1}


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv.gz", "t.jsonl.gz", "x.tar.gz", "x.tgz"])
def test_what_unpacks_to_far_more_than_it_is_ends_early(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzipped, "FREE_BYTES", 1 << 20)
    pictures(tmp_path, 1)
    filling = b"x" * (8 << 20)
    (tmp_path / name).write_bytes(gzip.compress(archive([("a.txt", filling)]) if name.startswith("x") else b"image,caption\n0.png," + filling))
    unpacked: list[int] = []
    read = gzip.GzipFile.read

    def counted(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        data = read(self, size)
        unpacked.append(len(data))
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    with pytest.raises(
        DataError, match=rf"{name}: its first .* bytes unpack to more than .*100 times the size .*unpack it \(gunzip\) and name the plain file"
    ):
        found_in(tmp_path / name)
    assert sum(unpacked) <= 4 << 20, "what was left was not unpacked"
    (tmp_path / name).unlink()


# --- Captions and cells -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["jsonl", "csv", "json", "parquet", "structs"])
def test_captions_in_nested_lists_are_a_counted_drop(form: str, tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    nested = [["a cat"], ["a dog"]]
    if form == "jsonl":
        rows = [{"image": "0.png", "captions": nested}, {"image": "1.png", "captions": ["a cat", "a dog"]}]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        (tmp_path / "t.csv").write_text('image\tcaptions\n0.png\t[["a cat"]]\n1.png\t["a cat", "a dog"]\n'.replace("\t", "|"))
    elif form == "json":
        (tmp_path / "0.json").write_text(json.dumps({"captions": nested}))
        (tmp_path / "1.json").write_text(json.dumps({"captions": ["a cat", "a dog"]}))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "captions": [nested]}), tmp_path / "0.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"image": ["1.png"], "captions": [["a cat", "a dog"]]}), tmp_path / "1.parquet")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"image": ["0.png"], "sentences": [[{"raw": nested}]]}), tmp_path / "0.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"image": ["1.png"], "sentences": [[{"raw": ["a cat", "a dog"]}]]}), tmp_path / "1.parquet")
    found, bad, _ = found_in(tmp_path)
    assert [item.captions for item in found] == [("a cat", "a dog")] and bad == {"captions in nested lists": 1}


def late(form: str, folder: Path, **columns: Any) -> None:
    made = pyarrow.table(columns)
    if form == "parquet":
        pyarrow.parquet.write_table(made, folder / "t.parquet")
    else:
        with pyarrow.ipc.new_file(folder / "t.arrow", made.schema) as out:
            out.write_table(made)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_date_that_no_calendar_has_costs_its_row_or_nothing(form: str, tmp_path: Path) -> None:
    moments = pyarrow.array([0, 1 << 62, 1], pyarrow.timestamp("us"))
    images, captions = [picture(number) for number in range(3)], ["one cat", "two cats", "three cats"]
    for name in ("taken", "id", "source", "license"):
        (tmp_path / name).mkdir()
        late(form, tmp_path / name, image=images, caption=captions, **{name: moments})
        assert [item.captions[0] for item in found_in(tmp_path / name)[0]] == captions, "nobody asked for this column"
    (tmp_path / "inside").mkdir()
    structs = pyarrow.StructArray.from_arrays([pyarrow.array(captions), moments], ["raw", "written"])
    late(form, tmp_path / "inside", image=images, sentences=structs)
    found, bad, _ = found_in(tmp_path / "inside")
    assert [item.captions[0] for item in found] == ["one cat", "three cats"] and bad == {"value that cannot be read": 1}
