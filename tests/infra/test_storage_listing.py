"""Listings by pattern and open streams: the same on local folders and on a real S3 server."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import globs, s3, storage
from infra.errors import ConfigError, DataError, MissingError

FILES = {
    "a.tar": b"1",
    "a-2.tar": b"22",
    "a.txt": b"333",
    "b/a.tar": b"4444",
    "b/c/a.tar": b"55555",
    "b/c/deep/er/a.tar": b"",
    "train[1].tar": b"7",
    ".hidden.tar": b"?",
    "b/.git/a.tar": b"?",
    ".tmp-half.tar": b"?",
}
SHOWN = sorted(name for name in FILES if "/." not in f"/{name}")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place that holds FILES."""
    place = str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3"))
    for name, data in FILES.items():
        storage.write_bytes(storage.join(place, name), data)
    return place


def names(url: str) -> list[str]:
    return [info.name for info in storage.glob(url)[1]]


def test_patterns_match_within_a_folder_or_at_any_depth_and_leave_hidden_files_out(root: str) -> None:
    assert sorted(names(root)) == SHOWN == sorted(names(root + "/"))
    assert sorted(names(f"{root}/**")) == SHOWN
    assert names(f"{root}/*.tar") == ["a-2.tar", "a.tar", "train[1].tar"]
    assert names(f"{root}/?.tar") == ["a.tar"]
    assert names(f"{root}/[ab].t*") == ["a.tar", "a.txt"]
    assert names(f"{root}/*/a.tar") == ["b/a.tar"]
    assert names(f"{root}/*/c/*.tar") == ["b/c/a.tar"]
    assert sorted(names(f"{root}/**/a.tar")) == ["a.tar", "b/a.tar", "b/c/a.tar", "b/c/deep/er/a.tar"]
    assert sorted(names(f"{root}/b/**/deep/**/*.tar")) == ["c/deep/er/a.tar"]
    assert names(f"{root}/x*/y") == [] == names(f"{root}/nowhere") == names(f"{root}/nowhere/*")


def test_names_are_relative_to_the_fixed_part_and_say_size_and_version(root: str) -> None:
    for url in (root, f"{root}/*.tar", f"{root}/**/*", f"{root}/a.tar"):
        base, infos = storage.glob(url)
        found = {info.name: info for info in infos}
        assert base == root and found["a.tar"].size == 1
        assert found["a.tar"].version == storage.stat(f"{root}/a.tar").version
        assert storage.read_bytes(storage.join(base, "a.tar")) == b"1"
    assert storage.glob(f"{root}/b/c*/*")[0] == f"{root}/b"


def test_a_file_that_is_written_again_has_another_version(root: str) -> None:
    url = f"{root}/a.tar"
    if not storage.is_remote(root):  # both writes may fall into one tick of the file system's clock
        os.utime(url, (time.time() - 1, time.time() - 1))
    before = storage.stat(url)
    storage.write_bytes(url, b"2")
    after = storage.stat(url)
    assert before.size == after.size == 1 and before.version != after.version


def test_a_name_with_special_characters_is_found_literally_or_escaped(root: str) -> None:
    assert names(globs.escape(f"{root}/train[1].tar")) == ["train[1].tar"]
    assert names(f"{root}/train[1].tar") == ["train[1].tar"]


def test_a_pattern_lists_no_folder_that_cannot_match(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    module, name = (s3, "list_objects") if storage.is_remote(root) else (globs, "local_level")
    listing = getattr(module, name)

    def record(place: object, start: str = "", **options: bool) -> object:
        asked.append((str(place), start))
        return listing(place, start, **options)

    monkeypatch.setattr(module, name, record)
    assert names(f"{root}/a*.tar") == ["a-2.tar", "a.tar"]
    assert asked == [(root, "a")]


def test_a_local_listing_is_in_the_order_of_full_names(tmp_path: Path) -> None:
    for name in ("one.jpg", "one/x", "one-2.jpg", "one.txt", "a"):
        storage.write_bytes(str(tmp_path / name), b"")
    assert names(str(tmp_path)) == sorted(["one.jpg", "one/x", "one-2.jpg", "one.txt", "a"])


def test_links_are_followed_but_not_in_circles_and_broken_ones_are_listed(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "real" / "x"), b"1")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "circle").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "broken").symlink_to(tmp_path / "nothing")
    infos = {info.name: info for info in storage.glob(str(tmp_path / "root"))[1]}
    assert set(infos) == {"broken", "link/x"} and infos["broken"].version == "broken link"


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(globs.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        names(str(tmp_path))


def test_a_pattern_in_the_name_of_a_bucket_is_refused(s3: str) -> None:
    with pytest.raises(ConfigError, match="not a valid"):
        names("s3://buck*/x")


_PARTS = st.lists(st.sampled_from(["a", "b", "ab", "c"]), min_size=1, max_size=4)


@given(name=_PARTS, pattern=st.lists(st.sampled_from(["a", "*", "a*", "?", "[ab]", "**"]), min_size=1, max_size=4))
def test_matching_agrees_with_a_regular_expression(name: list[str], pattern: list[str]) -> None:
    import re

    words = {"a": "a", "*": "[^/]*", "a*": "a[^/]*", "?": "[^/]", "[ab]": "[ab]"}
    middle = "".join("(?:[^/]+/)*" if part == "**" else words[part] + "/" for part in pattern[:-1])
    last = "(?:[^/]+/)*[^/]+" if pattern[-1] == "**" else words[pattern[-1]]
    assert globs.matches(name, pattern) == bool(re.fullmatch(middle + last, "/".join(name)))


# --- Streams ------------------------------------------------------------------------------------------------------------------------------


def test_a_stream_reads_from_any_byte_to_the_end(root: str) -> None:
    data = os.urandom(700_000)
    url = storage.join(root, "big")
    storage.write_bytes(url, data)
    for start in (0, 1, 300_000, len(data), len(data) + 5):
        with storage.open_stream(url, start) as stream:
            assert stream.read(10) == data[start : start + 10]
            assert stream.read(400_000) == data[start + 10 : start + 400_010]
    with storage.open_stream(url, 3) as stream:
        assert b"".join(iter(lambda: stream.read(99_999), b"")) == data[3:]


def test_a_seekable_file_reads_anywhere(root: str) -> None:
    data = os.urandom(10_000)
    url = storage.join(root, "big")
    storage.write_bytes(url, data)
    with storage.open_seekable(url) as file:
        assert file.seek(0, os.SEEK_END) == len(data) == file.tell()
        assert file.read(4) == b""
        assert file.seek(-8, os.SEEK_END) == len(data) - 8
        assert file.read(100) == data[-8:]
        file.seek(17)
        file.seek(3, os.SEEK_CUR)
        assert file.read(5) == data[20:25] and file.readable() and file.seekable()


def test_what_is_not_there_or_no_regular_file_cannot_be_opened(root: str, tmp_path: Path) -> None:
    for opened in (storage.open_stream, storage.open_seekable):
        with pytest.raises(MissingError, match="absent: does not exist"), opened(f"{root}/absent"):
            pass
    with pytest.raises(MissingError, match="absent: does not exist"):
        storage.stat(f"{root}/absent")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: not a regular file"), storage.open_stream(str(tmp_path / "pipe")):
        pass
