"""Tars as streams, the records in them, metadata beside them. Every broken tar is a DataError, every broken record is counted."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources import tar, tar_metadata
from data_pipeline.sources import webdataset as webdataset_source
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import NotRead, Pair, Unreadable
from data_pipeline.sources.webdataset import WebDatasetSource
from infra import storage
from infra.errors import DataError
from tests.support import img2dataset


def archive(members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def listed(data: bytes, limit: int = 1 << 20) -> list[tuple[str, int, bytes | None]]:
    return [member[:3] for member in tar.members(io.BytesIO(data), "x.tar", lambda name: limit) if not member.kind]


# --- The archive --------------------------------------------------------------------------------------------------------------------------

_NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=300).filter(
    lambda name: not name.endswith("/")
)


@given(
    members=st.lists(st.tuples(_NAMES, st.binary(max_size=1500)), max_size=6),
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_are_those_that_tarfile_wrote(members: list[tuple[str, bytes]], kind: int) -> None:
    members = [(name.rstrip("/"), data) for name, data in members if name.strip("/")]
    assert listed(archive(members, kind)) == [(name, len(data), data) for name, data in members]


def test_ustar_names_longer_than_a_hundred_bytes_are_whole() -> None:
    name = "/".join(["folder" * 5] * 6) + "/x.png"
    assert listed(archive([(name, b"1")], tarfile.USTAR_FORMAT)) == [(name, 1, b"1")]


def test_folders_links_and_devices_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for number, kind in enumerate((tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
            info = tarfile.TarInfo(f"x{number}")
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        info = tarfile.TarInfo("real")
        info.size = 3
        file.addfile(info, io.BytesIO(b"abc"))
    assert listed(out.getvalue()) == [("real", 3, b"abc")]


def test_a_member_above_its_limit_is_passed_over_in_pieces() -> None:
    data = archive([("big", bytes(3 << 20)), ("small", b"1")])
    assert listed(data, 1000) == [("big", 3 << 20, None), ("small", 1, b"1")]


def _header(name: bytes = b"x", size: bytes = b"00000000001\0", kind: bytes = b"0") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_old_headers_with_signed_sums_and_sizes_in_base_256_are_read() -> None:
    block = bytearray(_header("ü".encode(), b"\x80" + b"\0" * 10 + b"\1"))
    signed = sum(block) - sum(block[148:156]) + 8 * 32 - 256 * sum(byte > 127 for byte in [*block[:148], *block[156:]])
    block[148:156] = b"%06o\0 " % signed
    assert listed(bytes(block) + b"a" + bytes(511 + 1024)) == [("ü", 1, b"a")]


BROKEN = {
    "empty": (b"", "truncated: it ends at byte 0, without the end marker"),
    "no tar": (b"PK" * 1000, "not a tar archive: no header at byte 0"),
    "cut in a header": (archive([("a", b"1")])[:300], "truncated: it ends at byte 300"),
    "cut in a member": (archive([("a", bytes(5000))])[:3000], "truncated"),
    "cut between members": (archive([("a", b"1")])[:1024], "truncated: it ends at byte 1024"),
    "a later header damaged": (archive([("a", b"1")])[:1024] + b"x" * 2000, "damaged: no header at byte 1024"),
    "a size of words": (_header(size=b"abc"), "a size that is not a number at byte 0"),
    "a negative size": (_header(size=b"\xff" * 12), "a size that is not a number"),
    "a huge size": (_header(size=b"\x80" + b"\xff" * 11), "truncated"),
    "a huge pax header": (_header(kind=b"x", size=b"77777777777"), "a header of 8589934591 bytes at byte 0"),
    "a pax header without length": (_header(kind=b"x", size=b"4") + b"abcd" + bytes(508), "a pax header that cannot be read"),
    "a pax header without end": (_header(kind=b"x", size=b"10") + b"99 path=" + bytes(504), "a pax header that cannot be read"),
    "a pax size of words": (_header(kind=b"x", size=b"14") + b"12 size=abc\n" + bytes(500), "a size that is not a number before"),
    "sparse": (_header(kind=b"S"), "is a sparse file of GNU tar, which is not supported; write the archive without --sparse"),
}


@pytest.mark.parametrize(("data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_archive_is_a_data_error_that_names_it(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"^x.tar: .*{message}"):
        listed(data)


@given(st.data())
def test_whatever_is_damaged_is_a_data_error_or_other_members(data: st.DataObject) -> None:
    whole = bytearray(archive([("a.jpg", b"x" * 700), ("ä" * 60, b"y"), ("b.txt", b"z")]))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    with contextlib.suppress(DataError):
        assert len(listed(bytes(whole[:cut]))) <= 3


# --- Records ------------------------------------------------------------------------------------------------------------------------------


def source_of(url: object, **settings: Any) -> WebDatasetSource:
    return WebDatasetSource(SourceConfig(url=str(url), **settings))


def read(source: WebDatasetSource, wanted: Callable[[str], bool] = lambda group: True) -> list[Pair | Unreadable]:
    """The records, without what belongs to none (tests/data_pipeline/sources/test_accounting.py counts it)."""
    return [found for shard in source.shards() for found in source.read(shard, wanted) if not isinstance(found, NotRead)]


def records(folder: Path, members: list[tuple[str, bytes]], **settings: Any) -> dict[str, Any]:
    """Key in the tar -> captions, or the reason why it is unreadable."""
    (folder / "x.tar").write_bytes(archive(members))
    found = read(source_of(folder / "x.tar", **settings))
    keys = [item.id.removeprefix("x.tar/") for item in found]
    assert len(keys) == len(found)
    return dict(zip(keys, (item.captions if isinstance(item, Pair) else item.reason for item in found), strict=True))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_tar_is_read_the_same_from_a_folder_and_from_s3(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    said = {"caption": "three", "license": "CC0-1.0", "source": "museum", "split": "test", "group": "g", "id": 7, "key": "zzz"}
    members = [
        ("a/1.jpg", b"J" * 300_000),
        ("a/1.txt", b"one\r\n\n two \n"),
        ("a/1.json", json.dumps(said).encode()),
        ("./2.PNG", b"P"),
        ("./2.txt", b"t"),
    ]
    storage.write_bytes(storage.join(url, "train-0.tar"), archive(members))
    storage.write_bytes(storage.join(url, "notes.txt"), b"")
    source = open_source(SourceConfig(url=url, license="own"), DataConfig())
    assert isinstance(source, WebDatasetSource) and [shard.name for shard in source.shards()] == ["train-0.tar"]
    assert read(source) == [
        Pair("train-0.tar/a/7", ("three", "one", "two"), b"J" * 300_000, "museum", "CC0-1.0", "g", "validation"),
        Pair("train-0.tar/2", ("t",), b"P", url, "own", "train-0.tar/2", "train"),
    ]
    assert [pair.group for pair in read(source, lambda group: group != "g") if isinstance(pair, Pair)] == ["train-0.tar/2"]


def test_records_that_cannot_be_read_are_counted_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_source, "MAX_IMAGE_BYTES", 100)
    monkeypatch.setattr(webdataset_source, "MAX_TEXT_BYTES", 50)
    members = [
        *(("a.jpg", b"x"), ("a.txt", b" \n\t\n")),
        *(("b.txt", b"lonely"), ("c.jpg", b"lonely")),
        *(("d.jpg", b"x"), ("d.txt", b"d"), ("d.json", b"{")),
        *(("e.jpg", b"x" * 101), ("e.txt", b"e")),
        *(("f.jpg", b"x"), ("f.txt", b"f" * 51)),
        *(("g.jpg", b"x"), ("g.json", b"[" * 50)),
        *(("h.jpg", b"x"), ("h.txt", b"\xff\xfe bytes")),
        *(("../../etc/i.jpg", b"x"), ("../../etc/i.txt", b"i")),
        *(("j.mask.png", b"x"), ("j.cls", b"3"), ("j.jpg", b"y"), ("j.txt", b"j"), ("j.png", b"second")),
        *((".hidden.jpg", b"x"), ("._j.txt", b"x"), ("__MACOSX/._k.jpg", b"x"), ("noextension", b"x")),
        *(("a.jpg", b"again"), ("a.txt", b"again")),
    ]
    assert records(tmp_path, members) == {
        "a": "no caption",
        "b": "missing image",
        "c": "no caption",
        "d": "bad json",
        "e": "image file too large",
        "f": "text too long",
        "g": "bad json",
        "h": ("\ufffd\ufffd bytes",),
        "../../etc/i": ("i",),
        "j": ("j",),
        "j.png": "further image of a key",
    }


def test_a_key_that_comes_again_after_its_record_is_counted(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.txt", b"a"), ("b.jpg", b"2"), ("b.txt", b"b"), ("a.jpg", b"3"), ("a.txt", b"c")]
    (tmp_path / "x.tar").write_bytes(archive(members))
    found = read(source_of(tmp_path))
    assert [item.image if isinstance(item, Pair) else item.reason for item in found] == [b"1", b"2", "repeated key"]


def test_members_of_a_record_may_lie_apart(tmp_path: Path) -> None:
    images, texts = [(f"{n}.jpg", b"x") for n in range(5)], [(f"{n}.txt", b"%d" % n) for n in (3, 1, 4, 0)]
    assert records(tmp_path, images + texts) == {"3": ("3",), "1": ("1",), "4": ("4",), "0": ("0",), "2": "no caption"}
    assert records(tmp_path, texts + images) == {"0": ("0",), "1": ("1",), "3": ("3",), "4": ("4",), "2": "no caption"}


def test_what_waits_for_its_caption_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_source, "PENDING_BYTES", 25)
    images, texts = [(f"{n}.jpg", b"x" * 10) for n in range(5)], [(f"{n}.txt", b"%d" % n) for n in range(5)]
    assert records(tmp_path, images + texts) == {
        **dict.fromkeys("012", "no caption"),
        **{"3": ("3",), "4": ("4",)},
    }
    assert records(tmp_path, [("t.txt", b"t" * 30), ("a.jpg", b"x"), ("a.txt", b"a")]) == {"t": "missing image", "a": ("a",)}


def test_extensions_may_be_named(tmp_path: Path) -> None:
    members = [("1.input.png", b"i"), ("1.output.png", b"o"), ("1.en.txt", b"English"), ("1.de.txt", b"Deutsch"), ("1.json", b'{"alt": "a"}')]
    (tmp_path / "x.tar").write_bytes(archive(members))
    (pair,) = read(source_of(tmp_path, image="output.png", captions=("en.txt", "alt")))
    assert isinstance(pair, Pair) and pair.image == b"o" and pair.captions == ("a", "English")


def test_the_tars_of_img2dataset_are_read_and_their_companions_are_not(tmp_path: Path) -> None:
    img2dataset.webdataset(tmp_path)
    source = open_source(SourceConfig(url=str(tmp_path)), DataConfig())
    assert [shard.name for shard in source.shards()] == ["00000.tar"]
    found = read(source)  # type: ignore[arg-type]
    rows = [row for row in img2dataset.ROWS if row.image]
    assert [pair for pair in found if isinstance(pair, Pair)] == [
        Pair(f"00000.tar/{row.key}", (row.caption,), row.image or b"", str(tmp_path), "unknown", row.sha256 or "") for row in rows
    ]


def test_no_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .tar file there; data.sources accepts a folder of them, one of them, or a pattern such as data/\*.tar"):
        list(source_of(tmp_path).shards())


def test_a_tar_that_vanished_or_is_cut_is_named(tmp_path: Path) -> None:
    data = archive([("1.jpg", b"x"), ("1.txt", b"one"), ("2.jpg", b"y"), ("2.txt", b"two"), ("3.jpg", bytes(9999)), ("3.txt", b"three")])
    (tmp_path / "x.tar").write_bytes(data)
    source = source_of(tmp_path)
    (shard,) = source.shards()
    (tmp_path / "x.tar").write_bytes(data[:5000])
    found = source.read(shard, lambda group: True)
    first = next(found)
    assert isinstance(first, Pair) and first.id == "x.tar/1"
    with pytest.raises(DataError, match=r"x.tar: truncated"):
        next(found)
    (tmp_path / "x.tar").unlink()
    with pytest.raises(DataError, match=r"x.tar: does not exist"):
        next(source.read(shard, lambda group: True))


# --- Metadata beside tars -----------------------------------------------------------------------------------------------------------------


def line(shard: str, name: str, **more: Any) -> str:
    return json.dumps({"shard": shard, "file_name": name, **more}) + "\n"


def pairs_folder(folder: Path) -> Path:
    for shard in ("train-0.tar", "train-1.tar"):
        (folder / shard).write_bytes(archive([("0.png", b"0"), ("0.txt", b"one\ntwo"), ("1.jpg", b"1"), ("1.txt", b"x")]))
    (folder / "metadata-train.jsonl").write_text(
        line("train-0.tar", "0.png", id="emoji_a", captions=["one", "two", "three"], source="emoji", label="Red Apple", group="food", license="MIT")
        + "not json\n"
        + line("train-1.tar", "1.jpg", id="flickr_1", source="flickr", label=None, group="photo")
        + line("train-0.tar", "1.jpg", id="clip_b", source="clips", label="Red Apple", group="food")
    )
    (folder / "metadata-other.jsonl").write_text('{"file_name": "0.png", "text": "a table, not about tars"}\n')
    return folder


def test_metadata_beside_tars_enrich_their_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = str(pairs_folder(tmp_path))
    with caplog.at_level(logging.WARNING):
        found = read(source_of(url))
    assert found == [
        Pair("emoji_a", ("one", "two", "three"), b"0", "emoji", "MIT", "emoji/Red_Apple", "train"),
        Pair("clip_b", ("x",), b"1", "clips", "unknown", "clips/Red_Apple", "train"),
        Pair("train-1.tar/0", ("one", "two"), b"0", url, "unknown", "train-1.tar/0", "train"),
        Pair("flickr_1", ("x",), b"1", "flickr", "unknown", "flickr_1", "train"),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}/metadata-other.jsonl: 1 lines name no shard and file_name; they describe no image of a tar.",
        f"{url}/metadata-train.jsonl: 1 lines name no shard and file_name; they describe no image of a tar.",
    ]


def test_only_the_lines_about_a_tar_change_its_version(tmp_path: Path) -> None:
    pairs_folder(tmp_path)
    before = {shard.name: shard.version for shard in source_of(tmp_path).shards()}
    with (tmp_path / "metadata-train.jsonl").open("a") as file:
        file.write(line("train-1.tar", "0.png", captions=["new"]))
    after = {shard.name: shard.version for shard in source_of(tmp_path).shards()}
    assert before["train-0.tar"] == after["train-0.tar"] and before["train-1.tar"] != after["train-1.tar"]


def test_lines_are_merged_into_ranges_and_long_ones_are_passed_over(tmp_path: Path) -> None:
    text = line("a.tar", "0.png") + line("a.tar", "1.png") + line("b.tar", "0.png") + line("a.tar", "2.png")
    (tmp_path / "metadata.jsonl").write_text(text)
    places = tar_metadata.find(str(tmp_path), Origin(SourceConfig(url=str(tmp_path))))
    assert [(start, end) for _, start, end in places["a.tar"].ranges] == [
        (0, 2 * len(line("a.tar", "0.png"))),
        (text.index('{"shard": "a.tar", "file_name": "2'), len(text)),
    ]
    assert set(tar_metadata.rows(places["a.tar"])) == {"0.png", "1.png", "2.png"}
    stream = io.BytesIO(b"ab\n" + b"c" * 25 + b"\nde\n" + b"f" * 10)
    assert list(tar_metadata.lines_of(stream, 100, 10)) == [(100, b"ab\n"), (103, None), (129, b"de\n"), (132, None)]
