"""Tables of paths and captions: any cut into byte ranges yields the same records, and a bad row is counted alone."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources import table as table_source
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import NotRead, Pair, Unreadable
from data_pipeline.sources.rows_to_pairs import Draft
from data_pipeline.sources.table import TableSource
from infra import storage
from infra.errors import DataError


def source_of(url: object, step: int = 1 << 20, **settings: Any) -> TableSource:
    source = TableSource(SourceConfig(url=str(url), **settings), 1)
    source.step = step
    return source


def read(source: TableSource, wanted: Callable[[str], bool] = lambda group: True) -> list[Pair | Unreadable]:
    return [found for shard in source.shards() for found in source.read(shard, wanted) if not isinstance(found, NotRead)]


def table(folder: Path, name: str, text: str | bytes, **settings: Any) -> dict[str, Any]:
    """Place in the table -> captions, or the reason why it is unreadable. Images a.png to d.png are there."""
    for letter in "abcd":
        (folder / f"{letter}.png").write_bytes(letter.encode())
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    found = read(source_of(folder / name, **settings))
    return {item.id.removeprefix(f"{name}/"): (item.image.decode(), *item.captions) if isinstance(item, Pair) else item.reason for item in found}


def test_a_csv_with_a_header_quoted_newlines_and_lists(tmp_path: Path) -> None:
    text = '\ufeffCaption,image\r\n"one, with ""quotes""\nand a line",a.png\r\n\r\n"[""x"", ""y""]",b.png\n[no list],c.png\n'
    listed, unlisted = (text.encode().index(word) for word in (b'"[""x', b"[no list]"))
    assert table(tmp_path, "t.csv", text) == {
        "@18": ("a", 'one, with "quotes"\nand a line'),
        f"@{listed}": ("b", "x", "y"),
        f"@{unlisted}": ("c", "[no list]"),
    }


def test_a_tsv_without_a_header_tells_images_from_captions(tmp_path: Path) -> None:
    assert table(tmp_path, "t.tsv", 'a "small" cat\ta.png\n"quoted ""so"""\tb.png\nc\tc.png\textra\n\nd\n') == {
        "@0": ("a", 'a "small" cat'),
        "@20": ("b", 'quoted "so"'),
        "@42": "bad row",
        "@57": "bad row",
    }


def test_columns_may_be_named_by_header_or_number(tmp_path: Path) -> None:
    text = "path\talt_en\talt_de\tcaption\na.png\tcat\tKatze\tx\n"
    assert table(tmp_path, "t.tsv", text, image="path", captions=("alt_de", "alt_en")) == {"@27": ("a", "Katze", "cat")}
    assert table(tmp_path, "t.tsv", "7\ta.png\tb.png\tone\ttwo\n", image="2", captions=("3", "4")) == {"@0": ("b", "one", "two")}


def test_several_columns_of_one_usual_name_are_all_captions(tmp_path: Path) -> None:
    assert table(tmp_path, "t.csv", "file_name,caption_0,caption_1,text\na.png,x,y,z\n") == {"@35": ("a", "x", "y")}


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        (
            "a\tb\n",
            {},
            r"its first row, a, b, names no column of images that is known; its second row: \(none\)\. Name both in data.sources as image and captions",
        ),
        ("image\tKategorie\na.png\tx\n", {}, r"its first row, image, Kategorie, names no column of images"),
        ("a.png\tx\ty\n", {}, r"names no column of captions"),
        ("a.png\tx\n", {"image": "9"}, r"names no column of images"),
        ("image\tcaption\n", {"captions": ("text",)}, r"names no column of"),
        ("", {}, None),
        ("\n \n", {}, None),
    ],
)
def test_a_table_whose_columns_cannot_be_told_is_refused(text: str, settings: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    if message is None:
        assert table(tmp_path, "t.tsv", text, **settings) == {}
        return
    with pytest.raises(DataError, match=rf"t\.tsv: .*{message}"):
        table(tmp_path, "t.tsv", text, **settings)


def test_the_rows_of_one_image_are_one_record(tmp_path: Path) -> None:
    text = "image,caption,license\na.png,1,\na.png,2,MIT\nb.png,3,\na.png,4,MIT?\nc.png,5,MIT\nc.png,6,x\n"
    assert list(table(tmp_path, "t.csv", text).values()) == [("a", "1", "2", "4"), ("b", "3"), "rows of one image disagree"]
    pair = read(source_of(tmp_path / "t.csv"))[0]
    assert isinstance(pair, Pair) and pair.license == "MIT" and pair.group == "image/a.png"


def test_a_picture_with_too_many_rows_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_source, "MAX_RUN", 2)
    text = "".join(json.dumps({"image": "a.png", "caption": str(n)}) + "\n" for n in range(4))
    assert table(tmp_path, "t.jsonl", text) == {
        "@0": ("a", "0", "1"),
        "@70": "too many captions of one image",
        "@105": "too many captions of one image",
    }


def test_json_lines_say_all_about_their_images(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"image": "a.png", "captions": ["x", "y"], "id": "my-id", "group": "g", "split": "val", "source": "s", "license": "MIT"},
        {"file_name": "b.png", "text": "t", "id": 5, "key": "k"},
        {"image": "c.png", "sentences": ["1", None, "2"], "url": "https://example.org"},
        {"image": "c.png", "headline": "no usual name"},
        {"caption": "no image"},
        {"image": 3, "caption": "a number is no file"},
        [],
        {"image": "d.png", "caption": "\ud800 \u0000"},
    ]
    (tmp_path / "train.ndjson").write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows) + '{"image": "d.pn')
    for letter in "abcd":
        (tmp_path / f"{letter}.png").write_bytes(letter.encode())
    url = str(tmp_path)
    found = read(source_of(tmp_path))
    assert found[:3] == [
        Pair("my-id", ("x", "y"), b"a", "s", "MIT", "g", "validation"),
        Pair("train.ndjson/5", ("t",), b"b", url, "unknown", "image/b.png", "train"),
        Pair(found[2].id, ("1", "2"), b"c", url, "unknown", "https://example.org", "train"),
    ]
    assert [item.reason for item in found[3:-2] if isinstance(item, Unreadable)] == ["missing image"] * 2 + ["bad json"]
    assert isinstance(found[-2], Pair) and found[-2].captions == ("? \0",) and found[-1].reason == "bad json"  # type: ignore[union-attr]


def test_hostile_rows_are_counted_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_source, "MAX_TEXT_BYTES", 3000)
    (tmp_path / "pipe.png").mkdir()
    rows = [
        *("a.png\tfine", "\tno path", "nowhere.png\tx", "pipe.png\tx", "bad\0path.png\tx", f"{'long' * 300}.png\tx", f"{'n' * 300}.png\tx"),
        *("gs://b/a.png\tx", "b.png\t  ", f"c.png\t{'y' * 4000}", "ü" * 40 + "\t" + "z", "d.png\t\u202e\U0001f600"),
    ]
    found = list(table(tmp_path, "t.tsv", "image\tcaption\n" + "\n".join(rows)).values())
    assert found == [
        *(("a", "fine"), "missing image", "missing image", "image cannot be opened", "bad image path", "bad image path", "image cannot be opened"),
        *("bad image path", "no caption", "text too long", "missing image", ("d", "\u202e\U0001f600")),
    ]


def test_a_json_line_of_any_length_is_counted_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_source, "MAX_TEXT_BYTES", 3000)
    lines = [json.dumps({"image": "a.png", "caption": text}) for text in ("fine", "y" * 4000, "end")]
    assert list(table(tmp_path, "t.jsonl", "\n".join(lines)).values()) == [("a", "fine"), "text too long", ("a", "end")]


def test_a_csv_that_breaks_its_quotes_loses_rows_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_source, "MAX_TEXT_BYTES", 200_000)
    text = f'image,caption\na.png,"x"b\nb.png,{"long" * 40_000}\nc.png,fine\nd.png,{"w" * 300_000}\na.png,end\n'
    found = list(table(tmp_path, "t.csv", text).values())
    assert found[:3] == ["bad row", "bad row", ("c", "fine")] and found[-1] == ("a", "end") and set(found[3:-1]) <= {"bad row", "text too long"}


def test_images_on_the_web_are_not_fetched_and_one_hint_says_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = table(
            tmp_path, "Train_GCC-training.tsv", "a very typical bus station\thttp://lh6.example.com/-IvR?x=1\nsierra\tHTTPS://i.example.com/b.jpg\n"
        )
    assert list(found.values()) == ["image is a web address"] * 2
    assert len(caplog.records) == 1 and "run img2dataset on it, and name its output folder" in caplog.records[0].getMessage()


@pytest.mark.parametrize("place", ["local", "s3"])
def test_paths_are_relative_to_the_table_absolute_or_on_s3(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = str(tmp_path) if place == "local" else request.getfixturevalue("s3")
    for name in ("x/a.png", "b.png", "x/y/c.png"):
        storage.write_bytes(f"{url}/{name}", name.encode())
    rows = "".join(f"{path}\tcaption\n" for path in ("a.png", "../b.png" if place == "local" else f"{url}/b.png", f"{url}/x/y/c.png", "absent.png"))
    storage.write_text(f"{url}/x/t.tsv", "image\tcaption\n" + rows)
    source = open_source(SourceConfig(url=f"{url}/**/*.tsv"), DataConfig())
    assert isinstance(source, TableSource)
    found = read(source)
    assert [item.image for item in found if isinstance(item, Pair)] == [b"x/a.png", b"b.png", b"x/y/c.png"]
    assert [item.reason for item in found if isinstance(item, Unreadable)] == ["missing image"]
    assert found[0].id == "x/t.tsv/@14"


def test_only_wanted_images_are_opened(tmp_path: Path) -> None:
    table(tmp_path, "t.tsv", "image\tcaption\na.png\tx\nabsent.png\ty\n")
    assert [item.id for item in read(source_of(tmp_path), lambda group: group == "image/a.png")] == ["t.tsv/@14"]


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no .jsonl, .ndjson, .csv, .tsv file there"):
        list(source_of(tmp_path).shards())


def drafts(source: TableSource, shard: Any) -> list[tuple[str, tuple[str, ...]]]:
    loaded = source.table(shard.name.rpartition("@")[0], shard.version).drafts(*shard.span)
    return [(item.pair.id, item.pair.captions) if isinstance(item, Draft) else (item.id, (item.reason,)) for item in loaded]


_TEXT = st.text(st.sampled_from('ab" ,\t\r\n[]é\0'), max_size=12)
_CELLS = st.lists(st.tuples(st.sampled_from(["a.png", "b.png", "c.png"]), _TEXT), max_size=12)


@given(rows=_CELLS, suffix=st.sampled_from(["csv", "tsv", "jsonl"]), step=st.integers(1, 60), newline=st.sampled_from(["\n", "\r\n"]), noise=_TEXT)
def test_any_cut_yields_the_records_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], suffix: str, step: int, newline: str, noise: str
) -> None:
    out = io.StringIO()
    if suffix == "csv":
        writer = csv.writer(out, lineterminator=newline)
        writer.writerows([("image", "caption"), *rows])
    elif suffix == "tsv":
        out.write("".join("\t".join(row).replace("\n", " ") + newline for row in [("image", "caption"), *rows]))
    else:
        out.write("".join(json.dumps({"image": image, "caption": text}) + newline for image, text in rows))
    path = tmp_path_factory.mktemp("cut") / f"t.{suffix}"
    path.write_bytes((out.getvalue() + noise).encode())
    whole, cut = source_of(path), source_of(path, step)
    shards = list(cut.shards())
    assert len({shard.name for shard in shards}) == len(shards)
    assert [shard.span[0] for shard in shards[1:]] == [shard.span[1] for shard in shards[:-1]]
    expected = [found for shard in whole.shards() for found in drafts(whole, shard)]
    assert [found for shard in shards for found in drafts(cut, shard)] == expected
    if not noise and newline == "\n" and suffix == "jsonl":
        assert sum(len(captions) for _, captions in expected) <= len(rows)


def test_a_file_that_changes_makes_other_shards(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("image\tcaption\n" + "a.png\tx\n" * 20)
    before = list(source_of(tmp_path, 50).shards())
    (tmp_path / "t.tsv").write_text("image\tcaption\n" + "a.png\ty\n" * 21)
    after = list(source_of(tmp_path, 50).shards())
    assert [shard.name for shard in before] == [f"t.tsv@{start}" for start in (0, 50, 100, 150)]
    assert not {shard.version for shard in before} & {shard.version for shard in after}
