"""Sources: what a folder yields, how a kind is found, how sources are configured; and the filters."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources.drawings import EmojiSource
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.open_source import find_kind, open_source
from data_pipeline.sources.pairs import NotRead, Pair, Source, Unreadable
from data_pipeline.sources.rows_to_pairs import split_of_name
from data_pipeline.sources.table import TableSource
from data_pipeline.sources.webdataset import WebDatasetSource
from infra import storage
from infra.config import Section, load, parse, to_json
from infra.errors import ConfigError, DataError
from tests.support import img2dataset


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


def everything(source: Source, wanted: Callable[[str], bool] = lambda group: True) -> list[Pair | Unreadable]:
    return [found for shard in source.shards() for found in source.read(shard, wanted) if not isinstance(found, NotRead)]


def source_of(url: str, records: int = 1024, **settings: Any) -> FolderSource:
    return FolderSource(SourceConfig(url=url, **settings), records)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_folder_yields_images_with_captions_and_names_those_without(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = folder(str(tmp_path) if place == "local" else request.getfixturevalue("s3"))
    source = source_of(url)
    two, lonely, one = everything(source)
    assert isinstance(two, Pair) and two.captions == ("second",) and two.id == "b/two.jpg"
    assert lonely == Unreadable("lonely.png", "no caption")
    assert one == Pair("one.png", ("a red square", "red", "ä\ufffd"), png(), url, "unknown", "folder/one")
    assert list(source.credits()) == [url] == [source.name]


def test_a_json_beside_an_image_says_all_about_it(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for name, said in {
        "a": {"caption": "one", "license": "CC0-1.0", "source": "museum", "split": "val", "id": "museum-7", "group": "vase"},
        "b": {"captions": ["one", "two", None, " two "], "source": "https://example.org/long", "id": 12},
        "val/c": {"text": "\ud800x"},
        "d": ["no object"],
        "e": {"caption": "one\ntwo", "sha256": "ff"},
        "f": {"captions": []},
        "g": {"captions": ["one", 3]},
    }.items():
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    (tmp_path / "e.txt").write_text("one\ntwo\n")  # the same caption, not two more
    (tmp_path / "f.txt").write_text("from the text")
    found = {item.id: item for item in everything(source_of(str(tmp_path), license="CC-BY-4.0"))}
    assert found["museum-7"] == Pair("museum-7", ("one",), png(), "museum", "CC0-1.0", "vase", "validation")
    assert found["12"] == Pair("12", ("one", "two"), png(), str(tmp_path), "CC-BY-4.0", "folder/b")
    assert found["val/c.png"] == Pair("val/c.png", ("?x",), png(), str(tmp_path), "CC-BY-4.0", "folder/val/c", "validation")
    assert found["d.png"] == Unreadable("d.png", "bad json")
    assert found["g.png"] == Unreadable("g.png", "caption that is no text")
    e, f = found["e.png"], found["f.png"]
    assert isinstance(e, Pair) and e.captions == ("one\ntwo",) and e.group == "ff"
    assert isinstance(f, Pair) and f.captions == ("from the text",)


def test_a_split_that_is_configured_is_everyones(tmp_path: Path) -> None:
    folder(str(tmp_path))
    found = everything(source_of(str(tmp_path), split="validation"))
    assert {pair.split for pair in found if isinstance(pair, Pair)} == {"validation"}


def test_an_image_of_an_unwanted_group_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(str(tmp_path))
    opened: list[str] = []
    real = storage.open_stream

    def record(url: str, start: int = 0) -> Any:
        opened.append(url)
        return real(url, start)

    monkeypatch.setattr(storage, "open_stream", record)
    found = everything(source_of(str(tmp_path)), lambda group: group == "folder/one")
    assert [item.id for item in found] == ["lonely.png", "one.png"]
    assert not any(url.endswith("two.jpg") for url in opened) and any(url.endswith("one.png") for url in opened)


def test_the_first_caption_key_or_the_one_configured_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.json").write_text(json.dumps({"text": "t", "caption_0": "0", "caption_1": "1", "mine": "m"}))
    for names, expected in (((), ("0", "1")), (("mine", "text"), ("m", "t"))):
        (found,) = everything(source_of(str(tmp_path), captions=names))
        assert isinstance(found, Pair) and found.captions == expected


def test_a_file_that_vanished_or_cannot_be_opened_is_one_unreadable_record(tmp_path: Path) -> None:
    folder(str(tmp_path))
    source = source_of(str(tmp_path))
    (shard,) = source.shards()
    (tmp_path / "one.png").unlink()
    (tmp_path / "b" / "two.jpg").unlink()
    (tmp_path / "b" / "two.jpg").mkdir()
    reasons = {item.id.rpartition("/")[2]: item.reason for item in source.read(shard, lambda group: True) if isinstance(item, Unreadable)}
    assert reasons == {"lonely.png": "no caption", "one.png": "missing image", "two.jpg": "image cannot be opened"}


def test_files_beyond_the_limits_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_text("x" * (10 if name == "a" else 11))
    monkeypatch.setattr("data_pipeline.sources.folder.MAX_TEXT_BYTES", 10)
    monkeypatch.setattr("data_pipeline.sources.rows_to_pairs.MAX_IMAGE_BYTES", 10)
    assert [item.reason for item in everything(source_of(str(tmp_path))) if isinstance(item, Unreadable)] == ["image file too large", "text too long"]


def test_a_fault_that_may_pass_fails_the_shard_and_not_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(str(tmp_path))
    source = source_of(str(tmp_path))
    (shard,) = source.shards()

    def fail(*args: object, **options: object) -> object:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(DataError, match=r"two.txt: cannot be read \(Input/output error\)"):
        list(source.read(shard, lambda group: True))


def test_runs_of_names_hold_every_image_once_and_a_new_one_changes_one_run(tmp_path: Path) -> None:
    for number in range(300):
        storage.write_bytes(str(tmp_path / f"{number % 3}" / f"{number}.x.png"), b"i")
        storage.write_bytes(str(tmp_path / f"{number % 3}" / f"{number}.x.txt"), b"c")
    source = source_of(str(tmp_path), 20)
    before = list(source.shards())
    assert sorted(key for shard in before for key in shard.keys) == sorted(info.name for info in storage.glob(str(tmp_path))[1])
    assert 5 < len(before) < 60 and len({shard.name for shard in before}) == len(before)
    assert max(len(shard.keys) for shard in before) <= 2 * 4 * 20
    storage.write_bytes(str(tmp_path / "1" / "150.y.png"), b"i")
    after = list(source.shards())
    assert len(set(after) - set(before)) in (1, 2) and len(set(before) & set(after)) >= len(before) - 2
    storage.write_bytes(str(tmp_path / "2" / "2.x.txt"), b"another caption")
    assert len(set(source.shards()) - set(after)) == 1


def test_captions_are_found_however_names_are_interleaved(tmp_path: Path) -> None:
    for name in ("one.jpg", "one.masks/one.jpg", "one.masks/one.txt", "one.txt", "one-2.png", "one.v2.png", "one.v2.txt", "one/x.png", "one/x.txt"):
        storage.write_bytes(str(tmp_path / name), b"x")
    found = {item.id: isinstance(item, Pair) for item in everything(source_of(str(tmp_path), 1))}
    assert found == {"one.jpg": True, "one.masks/one.jpg": True, "one-2.png": False, "one.v2.png": True, "one/x.png": True}


def test_a_pattern_of_images_finds_their_captions(tmp_path: Path) -> None:
    folder(str(tmp_path))
    assert [item.id for item in everything(source_of(f"{tmp_path}/**/*.jpg"))] == ["b/two.jpg"]
    assert [item.id for item in everything(source_of(f"{tmp_path}/one.png"))] == ["one.png"]


def test_the_files_of_img2dataset_are_a_folder(tmp_path: Path) -> None:
    img2dataset.files(tmp_path)
    source = open_source(SourceConfig(url=str(tmp_path)), DataConfig())
    assert isinstance(source, FolderSource)
    found = everything(source)
    assert [pair.captions for pair in found if isinstance(pair, Pair)] == [(row.caption,) for row in img2dataset.ROWS if row.image]
    assert len(found) == 3 and [pair.group for pair in found if isinstance(pair, Pair)] == [row.sha256 for row in img2dataset.ROWS if row.image]


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"no such folder, or no image in it; expected for example apple.png"):
            list(source_of(str(place)).shards())
        with pytest.raises(DataError, match=r"no such folder or file, or it is empty; data.sources accepts 'emoji', and folders"):
            open_source(SourceConfig(url=str(place)), DataConfig())


def test_a_folder_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png())
    with pytest.raises(
        DataError, match=r"none of its 1 images has a same-named .txt or .json file; expected .* beside apple.txt, one caption a line"
    ):
        list(open_source(SourceConfig(url=str(tmp_path)), DataConfig()).shards())


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("a.tar", "a.parquet", "a_stats.json", "metadata.jsonl", "a.png", "a.txt"), "webdataset"),
        (("00000.parquet", "00000/0.jpg", "00000/0.txt", "00000_stats.json"), "folder"),
        (("a.png", "a.json"), "folder"),
        (("a.parquet", "images/a.png", "captions.tsv"), "parquet"),
        (("captions.TSV", "images/a.png", "images/b.txt"), "table"),
        (("metadata.jsonl", "a.png"), "table"),
        (("a.png",), "folder"),
    ],
)
def test_what_a_folder_holds_is_told_by_names(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"")
    assert find_kind(str(tmp_path)) == find_kind(f"{tmp_path}/**") == kind


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("emoji", "emoji"),
        ("x/*.tar", "webdataset"),
        ("s3://b/x/**/*.parquet", "parquet"),
        ("x.csv", "table"),
        ("x/*.jsonl", "table"),
        ("*.JPG", "folder"),
    ],
)
def test_a_file_or_pattern_is_told_by_its_own_name(url: str, kind: str) -> None:
    assert find_kind(url) == kind


def test_files_that_are_no_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.doc").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its files, such as notes.doc, is data; data.sources accepts"):
        find_kind(str(tmp_path))


def test_every_kind_opens_its_reader() -> None:
    from data_pipeline.sources.parquet import ParquetSource

    data = DataConfig(render_size=40, records_per_part=7)
    emoji = open_source(SourceConfig(url="emoji", split="train"), data)
    assert isinstance(emoji, EmojiSource) and (emoji.render_size, emoji.records_per_part, emoji.split) == (40, 7, "train")
    for kind, reader in (("folder", FolderSource), ("table", TableSource), ("parquet", ParquetSource), ("webdataset", WebDatasetSource)):
        source = open_source(SourceConfig.model_validate({"url": "somewhere", "kind": kind}), data)
        assert type(source) is reader and source.name == "somewhere"


def test_the_version_covers_every_setting_but_the_weight() -> None:
    version = source_of("x").version()
    assert version == source_of("x", weight=2.0).version()
    changed: list[dict[str, Any]] = [{"split": "train"}, {"image": "i"}, {"captions": ("c",)}, {"license": "l"}]
    assert len({version, *(source_of("x", **settings).version() for settings in changed)}) == 5


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train-00000.tar", "train"), ("a/b/val.tar", "validation"), ("train2017/00000.tar", "train"), ("test-00001-of-2.parquet", "validation")),
        *(("valid/train-0.tar", "train"), ("trains.csv", ""), ("val-thorens/a.tar", ""), ("x/validity/b.csv", ""), ("captions.tsv", "")),
    ],
)
def test_the_split_in_a_name_is_a_word_of_its_own(name: str, split: str) -> None:
    assert split_of_name(name) == split


# --- Configuration ------------------------------------------------------------------------------------------------------------------------


class Whole(Section):
    data: DataConfig = DataConfig()


def test_a_plain_string_stands_for_the_url_of_a_source_and_reads_back() -> None:
    for override, expected in (
        ('data.sources=["emoji", "s3://b/x"]', (SourceConfig(url="emoji"), SourceConfig(url="s3://b/x"))),
        (
            'data.sources=[{url="a", weight=2, captions=["c"]}, "b"]',
            (SourceConfig(url="a", weight=2.0, captions=("c",)), SourceConfig(url="b")),
        ),
    ):
        config = load(Whole, {}, "preset", [override])
        assert config.data.sources == expected
        assert load(Whole, parse(to_json(config), "config.json"), "config.json", []) == config
    tree = parse('[[data.sources]]\nurl = "a"\nkind = "table"\n', "preset.toml")
    assert load(Whole, tree, "preset.toml", []).data.sources == (SourceConfig(url="a", kind="table"),)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ('data.sources=[" "]', r"data\.sources\.0: an entry is empty; accepted are 'emoji' and"),
        (
            'data.sources=["a", {url="b", wait=1}]',
            r"data\.sources\.1\.wait: unknown key; accepted in \[data\.sources\.1\]: captions, image, kind, .*weight",
        ),
        ("data.sources=[{weight=1}]", r"data\.sources\.0\.url: Field required"),
        ('data.sources=[{url="a", weight=0}]', r"data\.sources\.0\.weight: .*greater than 0"),
        ('data.sources=[{url="a", kind="zip"}]', r"data\.sources\.0\.kind: .*'webdataset'.*given: 'zip'"),
        ('data.sources=[{url="a", split="test"}]', r"data\.sources\.0\.split: .*'validation'"),
        ('data.sources=[{url="a", kind="emoji"}]', r"data\.sources\.0: kind = 'emoji' does not fit url = 'a'; .* write \./emoji"),
        ('data.sources=[{url="emoji", kind="folder"}]', r"kind = 'folder' does not fit url = 'emoji'"),
        ("data.sources=[3]", r"data\.sources\.0: .*given: 3"),
        ("data.sources=[]", r"sources is empty"),
    ],
)
def test_a_wrong_source_is_refused_by_its_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Whole, {}, "preset", [override])
