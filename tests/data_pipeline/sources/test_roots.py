"""Sources stay below their roots: links, '..', absolute paths and other buckets are refused with the key that allows them, and nothing is quoted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DataConfig, FilterConfig, SourceConfig
from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.plan import make_plan
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import Found, NotRead, Pair, Unreadable
from infra import storage
from infra.errors import DataError
from tests.data_pipeline.sources.test_accounting import archive, pair, picture

SECRET = "AWS_SECRET_ACCESS_KEY=hunter2 is what stands in here"


def everything(url: object, **settings: Any) -> Iterator[Found]:
    source = open_source(SourceConfig(url=str(url), **settings), DataConfig())
    for shard in source.shards():
        yield from source.read(shard, lambda group: True)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A source with one good pair, and a folder outside with a secret and a picture."""
    inside, outside = tmp_path / "set", tmp_path / "elsewhere"
    for folder in (inside, outside):
        folder.mkdir()
    (inside / "good.png").write_bytes(picture(0))
    (inside / "good.txt").write_text("a red cat on a table")
    (outside / "secret.txt").write_text(SECRET)
    (outside / "other.png").write_bytes(picture(1))
    return inside, outside


def refused(inside: Path, outside: Path, found: list[Found]) -> None:
    """Exactly one record is outside; the refusal names the key and the value that allow it, and nothing of what lies there is quoted."""
    bad = [item for item in found if isinstance(item, Unreadable)]
    assert [item.reason for item in bad] == ["outside the source"]
    assert bad[0].why == f'add roots = ["{outside}"] to the source in data.sources to read it'
    assert SECRET not in repr(found)


@pytest.mark.parametrize("linked", ["caption", "image"])
def test_a_link_that_leads_outside_is_one_counted_record(linked: str, places: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    inside, outside = places
    if linked == "caption":
        (inside / "evil.png").write_bytes(picture(2))
        (inside / "evil.txt").symlink_to(outside / "secret.txt")
    else:
        (inside / "evil.png").symlink_to(outside / "other.png")
        (inside / "evil.txt").write_text("a caption of its own")
    with caplog.at_level(logging.WARNING):
        refused(inside, outside, list(everything(inside)))
    assert len(caplog.records) == 1 and f'roots = ["{outside}"]' in caplog.text and SECRET not in caplog.text
    assert sum(isinstance(item, Pair) for item in everything(inside, roots=(str(outside),))) == 2


def test_nothing_from_outside_is_an_example_of_what_was_dropped(places: tuple[Path, Path]) -> None:
    inside, outside = places
    (outside / "secret.txt").write_text("x" * 5000 + SECRET)
    (inside / "evil.png").write_bytes(picture(2))
    (inside / "evil.txt").symlink_to(outside / "secret.txt")
    plan = make_plan(DataConfig(sources=(SourceConfig(url=str(inside)),)), FilterConfig(), 8, 0)
    tally = Tally()
    assert [record.id for unit in plan.units for record in parts.accepted(plan, unit, tally)] == ["good.png"]
    assert list(tally.dropped) == ["outside the source"] and "xxx" not in json.dumps(tally.to_json())


def test_a_link_to_a_folder_outside_is_not_walked_and_is_counted(places: tuple[Path, Path]) -> None:
    inside, outside = places
    for name, data in pair("theirs", 3):
        (outside / name).write_bytes(data)
    (inside / "linked").symlink_to(outside)
    (inside / "own").mkdir()
    (inside / "again").symlink_to(inside / "own")
    source = open_source(SourceConfig(url=str(inside)), DataConfig())
    assert [key for shard in source.shards() for key in shard.keys] == ["good.png", "good.txt"]
    assert source.census.not_read == {"(link to a folder outside)": 1, "(link to a folder that is listed)": 1}
    assert sum(isinstance(item, Pair) for item in everything(inside, roots=(str(outside),))) == 2


@pytest.mark.parametrize(
    "path", ["../elsewhere/other.png", "{outside}/other.png", "file://{outside}/other.png", "linked.png", "s3://bucket/other.png"]
)
@pytest.mark.parametrize("table", ["csv", "tsv", "jsonl", "parquet"])
def test_a_row_that_names_a_file_outside_is_one_counted_record(path: str, table: str, places: tuple[Path, Path]) -> None:
    inside, outside = places
    (inside / "linked.png").symlink_to(outside / "other.png")
    (inside / "good.txt").unlink()
    rows = [("good.png", "a red cat"), (path.format(outside=outside), "a blue cat")]
    if table == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"image": [row[0] for row in rows], "caption": [row[1] for row in rows]}), inside / "t.parquet")
    elif table == "jsonl":
        (inside / "t.jsonl").write_text("".join(json.dumps({"image": image, "caption": caption}) + "\n" for image, caption in rows))
    else:
        mark = "," if table == "csv" else "\t"
        (inside / f"t.{table}").write_text("".join(f"{image}{mark}{caption}\n" for image, caption in [("image", "caption"), *rows]))
    refused(inside, Path("s3://bucket") if path.startswith("s3") else outside, [_as_shown(item) for item in everything(inside)])
    if not path.startswith("s3"):
        assert sum(isinstance(item, Pair) for item in everything(inside, roots=(str(outside),))) == 2


def _as_shown(item: Found) -> Found:
    if isinstance(item, Unreadable):  # Path() takes one slash of s3://
        return Unreadable(item.id, item.reason, item.why.replace("s3://", "s3:/"))
    return item


def test_an_object_of_another_bucket_or_prefix_is_outside(s3: str) -> None:
    storage.write_bytes(f"{s3}/set/a.png", picture(0))
    storage.write_bytes(f"{s3}/set/sub/b.png", picture(1))
    storage.write_bytes(f"{s3}/beside/c.png", picture(2))
    bucket = s3.removeprefix("s3://").partition("/")[0]
    paths = ("a.png", "sub/../a.png", "sub/b.png", "../beside/c.png", f"{s3}/beside/c.png", f"s3://{bucket}-other/c.png", f"{s3}/set/../beside/c.png")
    storage.write_text(f"{s3}/set/t.tsv", "image\tcaption\n" + "".join(f"{path}\tcaption {number} of it\n" for number, path in enumerate(paths)))
    found = list(everything(f"{s3}/set"))
    assert [item.reason if isinstance(item, Unreadable) else "" for item in found if not isinstance(item, NotRead)] == [
        "",
        "",
        "",
        *["outside the source"] * 4,
    ]
    assert sum(isinstance(item, Pair) for item in everything(f"{s3}/set", roots=(f"{s3}/beside",))) == 6


@pytest.mark.parametrize("name", ["x.tar", "t.csv", "p.parquet", "metadata.jsonl"])
def test_a_file_of_records_that_is_a_link_outside_is_refused_with_its_key(name: str, places: tuple[Path, Path]) -> None:
    inside, outside = places
    (outside / name).write_bytes(archive(pair("a")) if name.endswith("tar") else b"image,caption\nother.png," + SECRET.encode())
    (inside / name).symlink_to(outside / name)
    if name == "metadata.jsonl":  # a description beside tars: left alone
        (inside / "y.tar").write_bytes(archive(pair("a")))
        assert [type(item) for item in everything(inside)] == [Pair]
        return
    with pytest.raises(DataError, match=rf'a link that leads outside of the source; add roots = \["{outside}"\] to the source') as caught:
        list(everything(f"{inside}/*{Path(name).suffix}"))
    assert SECRET not in str(caught.value)


def test_a_source_that_is_a_link_itself_is_read(places: tuple[Path, Path], tmp_path: Path) -> None:
    inside, outside = places
    (tmp_path / "link").symlink_to(inside)
    (outside / "x.tar").write_bytes(archive(pair("a")))
    (tmp_path / "x.tar").symlink_to(outside / "x.tar")
    assert [type(item) for item in everything(tmp_path / "link")] == [type(item) for item in everything(tmp_path / "x.tar")] == [Pair]
