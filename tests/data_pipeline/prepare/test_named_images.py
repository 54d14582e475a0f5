"""An image that was replaced under the name by which a row knows it is noticed, at the price of a look at sizes and times."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from data_pipeline.prepare import named_images
from data_pipeline.prepare.named_images import Looks
from data_pipeline.prepare.outlook import outlook
from data_pipeline.prepare.plan import Plan
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, open_set
from infra import s3, storage
from infra.errors import UnreachableError
from tests.data_pipeline.prepare.test_contents import FORMS, forbid, plan_at, prepared
from tests.data_pipeline.sources.test_accounting import picture

PICTURES = 24
CAPTIONS = [f"a red cat number {number:02d} on a table" for number in range(PICTURES)]
NAMES = [f"{number:02d}.png" for number in range(PICTURES)]


def csv_table(place: Path) -> None:
    with (place / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *zip(NAMES, CAPTIONS, strict=True)])


def json_lines(place: Path) -> None:
    (place / "all.jsonl").write_text("".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in zip(NAMES, CAPTIONS, strict=True)))


def coco(place: Path) -> None:
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    annotations = [{"image_id": number, "caption": text} for number, text in enumerate(CAPTIONS)]
    (place / "captions_all.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def paths_in_parquet(place: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": NAMES, "caption": CAPTIONS}), place / "all.parquet", row_group_size=8)


def structs_in_parquet(place: Path) -> None:
    """Hugging Face's images, of which every second has no bytes."""
    images = [{"bytes": None if number % 2 else picture(number), "path": name} for number, name in enumerate(NAMES)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": CAPTIONS}), place / "all.parquet", row_group_size=8)


def paths_in_arrow(place: Path) -> None:
    with pyarrow.OSFile(str(place / "all.arrow"), "wb") as sink:
        table = pyarrow.table({"image": NAMES, "caption": CAPTIONS})
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


TABLES: dict[str, Callable[[Path], None]] = {
    "csv": csv_table,
    "jsonl": json_lines,
    "coco": coco,
    "paths in parquet": paths_in_parquet,
    "structs in parquet": structs_in_parquet,
    "paths in arrow": paths_in_arrow,
}


def written(form: str, place: Path) -> Path:
    place.mkdir()
    for number, name in enumerate(NAMES):
        (place / name).write_bytes(picture(number))
    TABLES[form](place)
    return place


def plan(place: object, **fields: Any) -> Plan:
    return plan_at(place, **({"records_per_part": 8} | fields))


def images_in(images: Path) -> list[bytes]:
    """The image of every record that is stored, parts of older versions left out."""
    return [row["image"] for split in ("train", "validation") for row in open_set(str(images / split), IMAGE_SCHEMA).records()]


def replace(path: Path, data: bytes) -> None:
    """Other bytes under the old name; at another time, as on any file system whose clock goes on."""
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))


@pytest.mark.parametrize("form", TABLES)
def test_an_image_that_was_replaced_under_its_name_is_read_again(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, images = written(form, tmp_path / "set"), tmp_path / "images"
    first, before = prepared(plan(place), images)
    number = 7
    other = picture(PICTURES + 1)
    replace(place / NAMES[number], other)
    size = sum((place / name).stat().st_size for name in NAMES)
    seen = outlook(plan(place), str(images))
    assert (seen.there, seen.looked_at, seen.made) == (first.units - 1, 1, 0) and seen.looked_at_bytes > 0
    assert seen.looked_at_bytes < size + 10_000
    share, after = prepared(plan(place), images)
    assert (share.written, share.recognised, share.skipped) == (1, 0, first.units - 1) and before["seen"] == after["seen"] == PICTURES
    assert {split: entry["version"] for split, entry in before["splits"].items()} != {
        split: entry["version"] for split, entry in after["splits"].items()
    }
    replace(place / NAMES[number], picture(number))  # and back, at a third time: the first part is found
    os.utime(place / NAMES[number], ns=(2 * 10**18, 2 * 10**18))
    forbid(monkeypatch, "prepared")
    share, _ = prepared(plan(place), images)
    assert (share.written, share.recognised) == (0, 1)
    assert outlook(plan(place), str(images)).there == first.units


@pytest.mark.parametrize("form", TABLES)
def test_an_image_of_which_only_the_time_changed_is_read_once_and_prepared_no_more(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, images = written(form, tmp_path / "set"), tmp_path / "images"
    first, _ = prepared(plan(place), images)
    os.utime(place / NAMES[7], ns=(10**18, 10**18))
    forbid(monkeypatch, "prepared")
    share, _ = prepared(plan(place), images)
    assert (share.written, share.recognised, share.skipped) == (0, 1, first.units)
    forbid(monkeypatch, "read")
    assert prepared(plan(place), images)[0].skipped == first.units


def test_an_image_that_was_missing_and_came_is_read(tmp_path: Path) -> None:
    place, images = written("csv", tmp_path / "set"), tmp_path / "images"
    (place / NAMES[7]).unlink()
    _, before = prepared(plan(place), images)
    (place / NAMES[7]).write_bytes(picture(7))
    share, after = prepared(plan(place), images)
    assert share.written == 1 and before["dropped"]["missing image"]["count"] == 1 and "missing image" not in after["dropped"]


def test_an_image_beyond_the_share_of_the_data_that_is_used_is_not_looked_at(tmp_path: Path) -> None:
    place = written("csv", tmp_path / "set")
    used = plan(place, share=0.5)
    looks = [look for unit in used.units if (look := used.look(unit))]
    assert 0 < sum(look.count for look in looks) < PICTURES
    whole = plan(place)
    looks = [look for unit in whole.units if (look := whole.look(unit))]
    assert sum(look.count for look in looks) == PICTURES and sum(look.bytes for look in looks) == sum((place / name).stat().st_size for name in NAMES)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "table"])
def test_sources_whose_rows_name_no_files_are_named_as_before_and_looked_at_no_further(form: str, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    FORMS[form](tmp_path / "set")
    found = plan_at(tmp_path / "set")
    assert found.units and all(found.look(unit) is None for unit in found.units)
    assert all(list(found.sources[unit.source].images(unit.shard, found.wanted)) == [] for unit in found.units)


def test_on_s3_the_folder_of_images_is_listed_once_and_images_are_not_asked_for_one_by_one(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = written("csv", tmp_path / "set")
    storage.upload_folder(place, f"{s3}/set")
    first, _ = prepared(plan(f"{s3}/set"), f"{s3}/images")
    storage.write_bytes(f"{s3}/set/{NAMES[7]}", picture(PICTURES + 1))
    calls = counted(monkeypatch)
    looked = plan(f"{s3}/set")
    calls.clear()
    assert outlook(looked, f"{s3}/images").looked_at == 1
    assert calls["images/", "head"] <= 1 and calls["set", "list"] == 1, calls  # one, to learn to which folder the paths are relative
    share, _ = prepared(plan(f"{s3}/set"), f"{s3}/images")
    assert (share.written, share.skipped) == (1, first.units - 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Requests for images and listings of their folder."""
    calls = Counter[tuple[str, str]]()
    head, listing = s3.head, s3.list_objects

    def counted_head(url: str) -> Any:
        calls["images/" if url.endswith(".png") else "other", "head"] += 1
        return head(url)

    def counted_listing(url: str, start: str = "", *, shallow: bool = False) -> Iterator[tuple[str, int, str]]:
        calls[url.rpartition("/")[2] if shallow else "other", "list"] += 1
        return listing(url, start, shallow=shallow)

    monkeypatch.setattr(s3, "head", counted_head)
    monkeypatch.setattr(s3, "list_objects", counted_listing)
    return calls


def test_a_folder_of_far_more_files_than_rows_name_is_not_listed_to_its_end(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        storage.write_bytes(f"{s3}/many/{number:02d}.png", picture(number))
    urls = [f"{s3}/many/{number:02d}.png" for number in (3, 4)]
    listed = Looks().at(iter(urls))
    monkeypatch.setattr(named_images, "_PAGE", 1)
    calls, looks = counted(monkeypatch), Looks()
    assert looks.at(iter(urls)) == listed and calls["images/", "head"] == 0, "sixteen pages are always read"
    monkeypatch.setattr(named_images, "_FEW_PAGES", 4)
    looks = Looks()
    assert looks.at(iter(urls)) == listed and calls["images/", "head"] == 2 and looks._folders == {f"{s3}/many": None}
    calls.clear()
    assert Looks().at(f"{s3}/many/{number:02d}.png" for number in range(11)).count == calls["images/", "head"] == 11, (
        "a page more than there are images"
    )
    calls.clear()
    assert Looks().at(f"{s3}/many/{number:02d}.png" for number in range(12)).count == 12 and calls["images/", "head"] == 0, "as many pages as images"


def test_what_is_remembered_of_listed_folders_is_bounded(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in "abc":
        for number in range(3):
            storage.write_bytes(f"{s3}/{folder}/{number}.png", picture(number))
    monkeypatch.setattr(named_images, "_HELD", 6)
    looks = Looks()
    found = [looks.at(iter([f"{s3}/{folder}/1.png"])) for folder in "abc"]
    assert list(looks._folders) == [f"{s3}/b", f"{s3}/c"] and len({look.digest for look in found}) == 1, "the oldest goes, and no more than must"


def test_what_is_not_there_is_missing_wherever_it_lies(tmp_path: Path, s3: str) -> None:
    for number in range(3):
        storage.write_bytes(f"{s3}/few/{number}.png", picture(number))
    there, here = (Looks().at(f"{place}/none-{number}.png" for number in range(8)) for place in (f"{s3}/few", str(tmp_path)))
    assert there == here and (here.count, here.bytes) == (8, 0)
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert Looks().at(iter([str(tmp_path / "loop.png")])).bytes == 0


def test_a_storage_that_does_not_answer_is_no_image_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(url: str) -> None:
        raise UnreachableError(f"{url}: no answer.")

    monkeypatch.setattr(storage, "stat", silent)
    with pytest.raises(UnreachableError, match="no answer"):
        Looks().at(iter([str(tmp_path / "a.png")]))


def test_rows_that_cannot_be_read_are_left_to_their_reader(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield str(tmp_path / "a.png")
        raise ValueError("damaged")

    assert Looks().at(broken()).count == 2
    assert Looks().at(iter([str(tmp_path / "a.png")])).count == 1
