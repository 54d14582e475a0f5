"""Folders as sources, input parts, and the filters."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.config import DataConfig
from data_pipeline.emoji_source import EmojiSource
from data_pipeline.filters import FILTERS, Candidate, first_reason
from data_pipeline.folder_source import FolderSource
from data_pipeline.pairs import Pair
from data_pipeline.sources import input_parts, open_source
from infra import storage
from infra.errors import ConfigError, DataError


def png(width: int = 32, height: int = 32, colour: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(out, "PNG")
    return out.getvalue()


def folder(url: str) -> str:
    for name in ("b/two.jpg", "one.png"):
        storage.write_bytes(storage.join(url, name), png())
    storage.write_bytes(storage.join(url, "one.txt"), "\ufeffa red square\n\n  red  \nä\udcff".encode("utf-8", "surrogateescape"))
    storage.write_bytes(storage.join(url, "b/two.txt"), b"second")
    storage.write_bytes(storage.join(url, "lonely.png"), png())
    storage.write_bytes(storage.join(url, "readme.txt"), b"no image of this name")
    storage.write_bytes(storage.join(url, ".hidden.png"), b"")
    return url


def check_folder(url: str) -> None:
    source = FolderSource(folder(url))
    assert source.keys() == ["b/two.jpg", "one.png"]
    pair = source.read("one.png")
    assert pair.captions == ("a red square", "red", "ä\ufffd")
    assert pair.image == png() and pair.id == f"{url}/one.png" and pair.source == url
    assert pair.group == source.group("one.png") != source.group("b/two.jpg")
    assert list(source.credits()) == [url]


def test_a_folder_yields_images_that_have_captions(tmp_path: Path) -> None:
    check_folder(str(tmp_path))


def test_a_folder_on_s3_yields_the_same(s3: str) -> None:
    check_folder(s3)


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no such folder, or it is empty; data.sources accepts 'emoji' and folders"):
            FolderSource(str(place)).keys()


def test_a_folder_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    with pytest.raises(
        DataError, match=r"none of its 1 files is an image with a same-named .txt file; expected for example apple.png .* beside apple.txt"
    ):
        FolderSource(str(tmp_path)).keys()


def test_an_entry_of_sources_opens_what_it_names() -> None:
    config = DataConfig(render_size=40)
    emoji = open_source("emoji", config)
    assert isinstance(emoji, EmojiSource) and emoji.render_size == 40
    other = open_source("s3://bucket/pictures", config)
    assert isinstance(other, FolderSource) and other.url == "s3://bucket/pictures"
    with pytest.raises(ConfigError, match=r"data.sources: an entry is empty; accepted are 'emoji' and"):
        open_source(" ", config)


def test_parts_hold_every_handle_once_and_cross_no_source() -> None:
    handles = [[f"a{i}" for i in range(7)], [], [f"b{i}" for i in range(4)]]
    parts = input_parts(handles, 3)
    assert [part.index for part in parts] == list(range(5))
    assert [len(part.keys) for part in parts] == [3, 3, 1, 3, 1]
    assert [key for part in parts for key in part.keys] == handles[0] + handles[2]
    assert [part.source for part in parts] == [0, 0, 0, 2, 2]


def reason(image: bytes, captions: tuple[str, ...] = ("x",), seen: set[tuple[bytes, tuple[str, ...]]] | None = None) -> str | None:
    return first_reason(Candidate(Pair("id", captions, image, "s", "l", "g"), 16, set() if seen is None else seen))


@pytest.mark.parametrize(
    ("image", "captions", "expected"),
    [
        (png(), ("", "  \t"), "empty caption"),
        (png(), (), "empty caption"),
        (b"nothing", ("x",), "undecodable image"),
        (png()[:50], ("x",), "undecodable image"),
        (png(15, 16), ("x",), "image too small"),
        (png(16, 33), ("x",), "aspect ratio"),
        (png(65, 32), ("x",), "aspect ratio"),
        (png(16, 32), ("x",), None),
        (png(64, 32), ("", "x"), None),
    ],
)
def test_each_filter_names_its_reason(image: bytes, captions: tuple[str, ...], expected: str | None) -> None:
    assert reason(image, captions) == expected


def test_only_an_accepted_pair_makes_the_next_one_a_duplicate() -> None:
    seen: set[tuple[bytes, tuple[str, ...]]] = set()
    assert reason(png(8, 8), seen=seen) == "image too small"
    assert reason(png(8, 8), seen=seen) == "image too small"
    assert reason(png(), seen=seen) is None
    assert reason(png(), seen=seen) == "exact duplicate"
    assert reason(png(), ("another caption",), seen=seen) is None


def test_filters_that_need_no_pixels_come_first() -> None:
    names = [check.__name__ for check in FILTERS]
    assert names.index("empty_caption") < names.index("exact_duplicate") < names.index("undecodable")
    candidate = Candidate(Pair("id", ("",), png(), "s", "l", "g"), 16, set())
    first_reason(candidate)
    assert candidate.pixels is None, "an empty caption must not cost a decode"
