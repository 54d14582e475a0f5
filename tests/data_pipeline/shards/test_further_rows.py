"""Take-downs by the id of any row that says a caption of an image, in sets that are prepared already."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.prepare import parts
from data_pipeline.prepare.contents import Contents
from data_pipeline.prepare.merge import finish
from data_pipeline.prepare.plan import SPLITS, Plan
from data_pipeline.shards.deletion import plan_purge, unmatched
from data_pipeline.shards.part_writer import PartWriter
from data_pipeline.shards.shard_set import FURTHER, IMAGE_SCHEMA, ShardSet, open_set
from infra.digests import id_hash
from infra.errors import DataError
from infra.world import World
from tests.data_pipeline.sources.test_accounting import archive, picture, plan_of
from tests.support.forged_sets import rehash
from tests.support.made_sets import code, image, make_codes, make_images
from tests.support.validated_sets import DVAE, passes, problems_of
from train.stages import encode

COUNT = 6
IMAGE = 2
"""The image that is taken down; its three rows are ROWS."""
ROWS = [f"row-{IMAGE}-{number}" for number in range(3)]


def source(place: Path, form: str, *, rows: int = 3, ids: bool = True) -> Path:
    """A set of COUNT images, each of which has as many captions in as many rows, with ids of their own."""
    place.mkdir()
    said = [{"image": f"{i}.png", "caption": f"a cat {i} on a table, {n}", "id": f"row-{i}-{n}"} for i in range(COUNT) for n in range(rows)]
    said = said if ids else [{key: row[key] for key in ("image", "caption")} for row in said]
    if form == "tar":
        (place / "x.tar").write_bytes(archive((f"{i}.png", picture(i)) for i in range(COUNT)))
        lines = [{"shard": "x.tar", "file_name": row["image"], **row} for row in said]
        (place / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return place
    for number in range(COUNT):
        (place / f"{number}.png").write_bytes(picture(number))
    if form == "shuffled.csv":
        said.sort(key=lambda row: row["caption"][-1])
    with (place / f"t.{form.rpartition('.')[2]}").open("w") as file:
        if form == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in said)
        else:
            writer = csv.DictWriter(file, list(said[0]))
            writer.writeheader()
            writer.writerows(said)
    return place


def prepared(place: Path, images: Path, **fields: Any) -> tuple[Plan, dict[str, Any]]:
    plan = plan_of(place, validation_share=0.4, **fields)
    parts.run(plan, str(images), World.single())
    return plan, finish(plan, str(images))


@pytest.mark.parametrize("form", ["jsonl", "csv", "shuffled.csv", "tar"])
def test_the_id_of_any_row_takes_its_image_down_in_a_set_that_is_prepared(form: str, tmp_path: Path) -> None:
    place = source(tmp_path / "set", form)
    _, before = prepared(place, tmp_path / "images")
    assert sum(split["count"] for split in before["splits"].values()) == COUNT
    urls = [str(tmp_path / "images" / split) for split in SPLITS]
    (url,) = (url for url in urls if ROWS[0] in {record["id"] for record in open_set(url, IMAGE_SCHEMA).records()})
    for named in ROWS:
        (tmp_path / "list").write_text(f"{named}\nof-no-record\n")
        opened = open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "list"))
        gone = {record["id"] for record in open_set(url, IMAGE_SCHEMA).records()} - {record["id"] for record in opened.records()}
        assert gone == {ROWS[0]} and opened.count == open_set(url, IMAGE_SCHEMA).count - 1
        purge = plan_purge(url, opened.taken_ids)
        assert purge is not None and purge.records == 1
        assert unmatched(urls, [named, "of-no-record"]) == ["of-no-record"]
    _, again = prepared(place, tmp_path / "images", takedown=str(tmp_path / "list"))
    assert again["takedown"] == {"lines": 2, "without_match": 1, "examples": ["of-no-record"]}


@pytest.mark.parametrize("form", ["jsonl", "csv", "tar"])
def test_parts_whose_images_have_one_row_or_rows_without_ids_are_as_they_were(form: str, tmp_path: Path) -> None:
    for number, (rows, ids) in enumerate([(1, True), (3, False), (3, True)]):
        plan = plan_of(source(tmp_path / f"set-{number}", form, rows=rows, ids=ids), validation_share=0.4)
        assert [unit.shard.joins for unit in plan.units] == [rows > 1 and ids]
        parts.run(plan, str(tmp_path / f"images-{number}"), World.single())
        assert bool(list((tmp_path / f"images-{number}").glob(f"*/part-*/{FURTHER}"))) == (rows > 1 and ids)


def test_the_dry_run_says_why_parts_of_joined_rows_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = source(tmp_path / "set", "csv")
    with monkeypatch.context() as before:
        before.setattr("data_pipeline.sources.table_copies._look", lambda table: (True, False))
        before.setattr("data_pipeline.sources.table_copies._VERSION", 0)
        plan, _ = prepared(place, tmp_path / "images")
    plan = plan_of(place, validation_share=0.4)
    contents = Contents(plan, str(tmp_path / "images"))
    (unit,) = plan.units
    assert not contents.is_done(contents.inputs(unit)) and not contents.candidates(unit), "the old part has no ids of further rows"
    assert contents.why(unit) == "another value of the ids of further rows of an image, which parts hold now"


def with_rows(number: int, **fields: Any) -> Any:
    return image(number, further=tuple(map(id_hash, (f"row-{number}-1", f"row-{number}-2"))), **fields)


def test_codes_are_taken_down_by_the_same_ids_as_their_images(tmp_path: Path) -> None:
    images = make_images(str(tmp_path / "images"), [[image(0), with_rows(1), with_rows(2)]])
    unit = encode.Unit(0, "train", images, 0, str(tmp_path / "codes"), "ab")
    maker: Any = SimpleNamespace(codes=lambda records, crop: (code(int(record["id"][3:])) for record in records))
    with PartWriter(unit.url, unit.inputs) as writer:
        for record in encode._codes(maker, unit):
            writer.add(record)
        marker = writer.finish()
    part = {"name": "part-ab", "source": "", "count": 3, "files": marker["files"]}
    found = ShardSet(unit.url, {"parts": [part], "stored": 3, "settings": {}}, frozenset({"row-2-2"}))
    assert found.taken_down.tolist() == [2]
    plain = make_images(str(tmp_path / "plain"), [[image(0)]])
    assert [record.further for record in encode._codes(maker, encode.Unit(0, "train", plain, 0, "", "cd"))] == [()]


def test_validate_knows_these_ids_and_refuses_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_images(str(tmp_path / "images"), [[image(0), with_rows(1), image(2)]])
    make_codes(str(tmp_path / "codes"), [[code(0), code(2)]], {"dvae": DVAE, "images": made.content_hash})
    (tmp_path / "list").write_text("row-1-2\n")
    place = str(tmp_path / "images")
    assert "1 images of" in problems_of(tmp_path / "codes", capsys, images=place)
    passes(tmp_path / "codes", capsys, images=place, takedown=str(tmp_path / "list"))
    passes(tmp_path / "images", capsys)
    bad = make_images(str(tmp_path / "bad"), [[image(0, further=(7,))]])
    file = Path(bad.url, bad.parts[0]["name"], FURTHER)
    file.write_bytes(np.array([id_hash("id-9"), 7], "<u8").tobytes())
    assert f"{FURTHER} " in problems_of(tmp_path / "bad", capsys)
    with pytest.raises(DataError, match=rf"{FURTHER}: damaged, its SHA-256 is not the one it was written with; delete .* and run the stage"):
        open_set(bad.url, IMAGE_SCHEMA).further_ids()


def test_validate_finds_further_rows_of_records_that_the_part_does_not_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = make_images(str(tmp_path / "bad"), [[image(0, further=(7,))]])
    Path(bad.url, bad.parts[0]["name"], FURTHER).write_bytes(np.array([id_hash("id-9"), 7], "<u8").tobytes())
    rehash(bad)
    assert "it names records that the part does not have" in problems_of(tmp_path / "bad", capsys)
