"""Inputs of which only the time, the ETag or the store changed keep their parts: each is read once, and an edited file of equal size is found."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.prepare import parts
from data_pipeline.prepare.merge import finish
from data_pipeline.prepare.outlook import outlook
from data_pipeline.prepare.parts import BEYOND_SHARE
from data_pipeline.prepare.plan import Plan
from data_pipeline.sources import rows_to_pairs
from infra import storage
from infra.world import World
from tests.data_pipeline.sources.test_accounting import picture, plan_of

PICTURES = 24
LATER_NS = 10**18


def caption(number: int) -> str:
    return f"a red cat number {number:02d} on a table"


def folder(place: Path) -> None:
    for number in range(PICTURES):
        (place / f"{number:02d}.png").write_bytes(picture(number))
        (place / f"{number:02d}.txt").write_text(caption(number))


def tars(place: Path) -> None:
    for shard in range(3):
        with tarfile.open(place / f"{shard}.tar", "w") as file:
            for number in range(8 * shard, 8 * shard + 8):
                for name, data in ((f"{number:02d}.png", picture(number)), (f"{number:02d}.txt", caption(number).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    file.addfile(info, io.BytesIO(data))


def table(place: Path) -> None:
    with (place / "all.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption"])
        for number in range(PICTURES):
            (place / f"{number:02d}.png").write_bytes(picture(number))
            rows.writerow([f"{number:02d}.png", caption(number)])


def parquet(place: Path) -> None:
    columns = {"image": [picture(number) for number in range(PICTURES)], "caption": [caption(number) for number in range(PICTURES)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), place / "all.parquet", row_group_size=8)


FORMS: dict[str, Callable[[Path], None]] = {"folder": folder, "tars": tars, "table": table, "parquet": parquet}


def plan_at(place: object, **fields: Any) -> Plan:
    return plan_of(place, **({"validation_share": 0.3, "records_per_part": 4} | fields))


def prepared(plan: Plan, images: object) -> tuple[parts.Share, dict[str, Any]]:
    share = parts.run(plan, str(images), World.single())
    return share, finish(plan, str(images))


def names(images: object) -> list[list[str]]:
    return [[part["name"] for part in storage.read_json(f"{images}/{split}/manifest.json")["parts"]] for split in ("train", "validation")]


def at_another_time(place: Path) -> None:
    for number, path in enumerate(sorted(place.iterdir())):
        os.utime(path, ns=(LATER_NS + number, LATER_NS + number))


def forbid(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def fail(*_: object) -> None:
        raise AssertionError(what)

    monkeypatch.setattr(parts, "judge", fail)
    monkeypatch.setattr(parts, "_write", fail)
    if what == "read":
        monkeypatch.setattr(parts, "_content", fail)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_a_copy_of_a_set_filters_nothing_again_and_is_read_once(form: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    FORMS[form](tmp_path / "here")
    plan_then = partial(plan_at, share=share)
    first, summary = prepared(plan_then(tmp_path / "here"), tmp_path / "images")
    assert first.written == first.units > 0 and summary["seen"] == PICTURES and (BEYOND_SHARE in summary["dropped"]) == (share < 1)
    before = names(tmp_path / "images")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    at_another_time(tmp_path / "there")
    there = plan_then(tmp_path / "there")
    assert not {there.inputs(unit) for unit in there.units} & {part.removeprefix("part-") for part in before[0]}, "the times tell them apart"
    seen = outlook(there, str(tmp_path / "images"))
    assert (seen.there, seen.looked_at, seen.made) == (0, first.units, 0) and seen.looked_at_bytes > 0
    forbid(monkeypatch, "prepared")
    found, again = prepared(there, tmp_path / "images")
    assert (found.written, found.skipped, found.recognised) == (0, first.units, first.units)
    assert names(tmp_path / "images") == before and again["seen"] == PICTURES
    forbid(monkeypatch, "read")
    found, _ = prepared(plan_then(tmp_path / "there"), tmp_path / "images")
    assert (found.skipped, found.recognised) == (first.units, 0) and names(tmp_path / "images") == before
    assert outlook(plan_then(tmp_path / "there"), str(tmp_path / "images")).there == first.units


def test_an_edited_file_of_equal_size_is_found_and_only_its_part_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    first, _ = prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    at_another_time(tmp_path / "set")
    edited = tmp_path / "set" / "07.txt"
    edited.write_text(edited.read_text().replace("cat", "dog"))
    share, _ = prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    assert (share.written, share.recognised) == (1, first.units - 1)
    captions = [line for split in ("train", "validation") for line in _captions(tmp_path / "images" / split)]
    assert caption(7).replace("cat", "dog") in captions and caption(7) not in captions and len(captions) == PICTURES


def _captions(place: Path) -> list[str]:
    from data_pipeline.shards.shard_set import IMAGE_SCHEMA, open_set

    return [caption for captions in open_set(str(place), IMAGE_SCHEMA).captions() for caption in captions]


def test_a_set_that_is_copied_to_s3_is_the_one_that_was_prepared_here(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    tars(tmp_path / "set")
    first, _ = prepared(plan_at(tmp_path / "set"), f"{s3}/images")
    storage.upload_folder(tmp_path / "set", f"{s3}/copy")
    forbid(monkeypatch, "prepared")
    share, _ = prepared(plan_at(f"{s3}/copy"), f"{s3}/images")
    assert (share.written, share.recognised) == (0, first.units)


def test_a_part_that_was_deleted_is_made_again_under_its_name_for_the_copy_too(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    tars(tmp_path / "set")
    prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    at_another_time(tmp_path / "set")
    prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    before = names(tmp_path / "images")
    for split in ("train", "validation"):
        shutil.rmtree(tmp_path / "images" / split / before[0][1])
    share, _ = prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    assert share.written == 1 and names(tmp_path / "images") == before


def test_a_part_that_is_not_there_is_no_part_of_a_moved_input(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    tars(tmp_path / "set")
    first, before = prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    gone = names(tmp_path / "images")[0][1]
    for split in ("train", "validation"):
        shutil.rmtree(tmp_path / "images" / split / gone)
    at_another_time(tmp_path / "set")
    assert (found := outlook(plan_at(tmp_path / "set"), str(tmp_path / "images"))).made == 1 and found.looked_at == first.units - 1
    share, after = prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    assert (share.written, share.recognised) == (1, first.units - 1) and after["seen"] == before["seen"]
    assert gone not in names(tmp_path / "images")[0]


def test_a_part_that_was_made_and_deleted_is_made_again_without_a_look_at_older_ones(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    older = set(names(tmp_path / "images")[0])
    at_another_time(tmp_path / "set")
    (tmp_path / "set" / "07.txt").write_text(caption(7).replace("cat", "dog"))
    prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    (newer,) = set(names(tmp_path / "images")[0]) - older
    for split in ("train", "validation"):
        shutil.rmtree(tmp_path / "images" / split / newer)
    found = outlook(plan_at(tmp_path / "set"), str(tmp_path / "images"))
    assert (found.looked_at, found.made) == (0, 1) and found.why == {"its part was deleted, or never finished": 1}


def test_a_stop_while_records_are_compared_leaves_nothing_begun(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    tars(tmp_path / "set")
    prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    at_another_time(tmp_path / "set")
    before = sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file())
    asked = iter([False] + [True] * 9)
    share = parts.run(plan_at(tmp_path / "set"), str(tmp_path / "images"), World.single(), stop=lambda: next(asked))
    assert (share.written, share.skipped) == (0, 0) and before == sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file())


def test_an_input_that_kills_its_reader_while_it_is_compared_is_a_try_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    tars(tmp_path / "set")
    plan = plan_at(tmp_path / "set")
    prepared(plan, tmp_path / "images")
    at_another_time(tmp_path / "set")

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "_content", killed)
    with pytest.raises(KeyboardInterrupt):
        parts.run(plan_at(tmp_path / "set"), str(tmp_path / "images"), World.single())
    assert [path.name for path in (tmp_path / "images" / "tries").rglob("*.json")] == ["000.json"]


def test_a_first_preparation_reads_each_input_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    opened, open_stream = Counter[str](), storage.open_stream

    def counted(url: str, start: int = 0) -> Any:
        opened[Path(url).name] += str(tmp_path / "set") in url
        return open_stream(url, start)

    monkeypatch.setattr(storage, "open_stream", counted)
    prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    assert {opened[f"{number:02d}.{suffix}"] for number in range(PICTURES) for suffix in ("png", "txt")} == {1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"filters": {"min_words": 2}}, "another value of filters"),
        ({"validation_share": 0.4}, "another value of data.validation_share"),
        ({"captions": ["txt"]}, "another value of data.sources: captions"),
        ({"file": "0.tar"}, "another value of the size of its files, or their names"),
        ({"new": "9.tar"}, "new"),
        ({"deleted": "0.tar"}, "its part was deleted, or never finished"),
    ],
)
def test_the_outlook_says_why_a_part_is_made(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    place, images = tmp_path / "set", tmp_path / "images"
    place.mkdir()
    tars(place)
    prepared(plan_at(place), images)
    fields = {key: change.pop(key) for key in ("filters", "validation_share") if key in change}
    if grown := change.get("file") or change.get("new"):
        (place / str(grown)).write_bytes((place / "1.tar").read_bytes() + bytes(10240))
    if "deleted" in change:
        shutil.rmtree(images / "train" / names(images)[0][0])
    source: Any = {"url": str(place), "captions": change["captions"]} if "captions" in change else place
    options: dict[str, Any] = {"validation_share": 0.3, "records_per_part": 4} | fields
    found = outlook(plan_of(source, **options), str(images))
    one = "file" in change or "new" in change or "deleted" in change
    assert found.why == {words: 1 if one else 3} and found.made_bytes > 0


def test_a_file_that_leads_outside_is_not_read_to_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    (tmp_path / "secret.txt").write_text("a red cat that nobody may see")
    (tmp_path / "set" / "00.txt").unlink()
    (tmp_path / "set" / "00.txt").symlink_to(tmp_path / "secret.txt")
    plan = plan_at(tmp_path / "set")
    share, summary = prepared(plan, tmp_path / "images")
    assert share.written == share.units and summary["dropped"]["outside the source"]["count"] == 1
    at_another_time(tmp_path / "set")
    (tmp_path / "secret.txt").unlink()
    (tmp_path / "secret.txt").write_text("a red dog that nobody may see")
    forbid(monkeypatch, "prepared")
    share, _ = prepared(plan_at(tmp_path / "set"), tmp_path / "images")
    assert share.recognised == share.units, "what it leads to is no part of the record"


def test_of_a_share_of_the_data_no_more_is_read_to_be_compared_than_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    plan = plan_at(tmp_path / "set", share=0.5)
    _, summary = prepared(plan, tmp_path / "images")
    used = PICTURES - summary["dropped"][BEYOND_SHARE]["count"]
    at_another_time(tmp_path / "set")
    read, read_limited = list[str](), rows_to_pairs.read_limited

    def noted(url: str, *limits: Any) -> bytes:
        read.append(url)
        return read_limited(url, *limits)

    monkeypatch.setattr(rows_to_pairs, "read_limited", noted)
    forbid(monkeypatch, "prepared")
    share, _ = prepared(plan_at(tmp_path / "set", share=0.5), tmp_path / "images")
    assert share.recognised == share.units and len([url for url in read if url.endswith(".png")]) == used < PICTURES


def test_an_edited_file_of_equal_size_is_found_in_a_share_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    folder(tmp_path / "set")
    prepared(plan_at(tmp_path / "set", share=0.7), tmp_path / "images")
    before = _captions(tmp_path / "images" / "train")
    number = int(re.findall(r"\d\d", before[0])[0])
    at_another_time(tmp_path / "set")
    (tmp_path / "set" / f"{number:02d}.txt").write_text(caption(number).replace("cat", "dog"))
    share, _ = prepared(plan_at(tmp_path / "set", share=0.7), tmp_path / "images")
    assert (share.written, share.recognised) == (1, share.units - 1)
    assert caption(number).replace("cat", "dog") in _captions(tmp_path / "images" / "train")
