"""One rule of ids and splits in a set; take-down lists in both spellings, on sets of either rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import parts
from data_pipeline.prepare.identity import check
from data_pipeline.prepare.merge import finish
from data_pipeline.shards.deletion import plan_purge, unmatched
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ImageRecord, open_set
from data_pipeline.shards.spellings import bases_of, spellings, takedown_lines
from data_pipeline.shards.versions import write_set
from infra.errors import DataError
from infra.world import World
from tests.data_pipeline.sources.test_accounting import picture, plan_of


def source(place: Path, count: int = 24) -> Path:
    place.mkdir(parents=True)
    for number in range(count):
        (place / f"{number:02d}.png").write_bytes(picture(number))
        (place / f"{number:02d}.txt").write_text(f"a red cat number {number} on a table")
    return place


def made(place: Path, images: Path, **fields: Any) -> dict[str, Any]:
    plan = plan_of(place, validation_share=0.3, **fields)
    parts.run(plan, str(images), World.single())
    return finish(plan, str(images))


def test_what_is_seen_is_dropped_or_in_a_split_and_what_is_listed_is_read_or_not(tmp_path: Path) -> None:
    place = source(tmp_path / "set")
    (place / "broken.png").write_bytes(b"no image")
    (place / "broken.txt").write_text("a caption of what cannot be decoded")
    (place / "00-again.png").write_bytes(picture(0))
    (place / "00-again.txt").write_text("a red cat number 0 on a table")
    (place / "notes.doc").write_bytes(b"")
    summary = made(place, tmp_path / "images")
    dropped = sum(entry["count"] for entry in summary["dropped"].values())
    assert summary["seen"] == 26 == dropped + sum(entry["count"] for entry in summary["splits"].values()) and dropped == 2
    assert summary["files"] == {str(place): {"listed": 53, "read": 52, "pictures": 0, "not_read": {".doc": 1}}}


def test_a_set_of_another_rule_is_read_and_not_grown(tmp_path: Path) -> None:
    place = source(tmp_path / "set")
    old = [ImageRecord(f"{place}/00.png", ["a red cat"], picture(0), 16, 16, "s", "unknown", "folder/00", "train")]
    write_set(str(tmp_path / "images" / "train"), [old], IMAGE_SCHEMA, {"sources": [str(place)]})
    assert open_set(str(tmp_path / "images" / "train"), IMAGE_SCHEMA).count == 1
    plan = plan_of(place)
    for refuse in (lambda: check(plan, str(tmp_path / "images")), lambda: made(place, tmp_path / "images")):
        with pytest.raises(
            DataError,
            match=r"made by the rule by which ids are absolute paths.*no records can be added.* launcher.py prepare PRESET .* data.images=PLACE",
        ):
            refuse()


def test_a_set_of_drawings_may_grow_by_sources_of_the_present_rule(tmp_path: Path) -> None:
    drawing = [ImageRecord("twemoji/1f34e", ["a red apple"], picture(0), 16, 16, "twemoji", "CC-BY-4.0", "emoji/apple", "train")]
    write_set(str(tmp_path / "images" / "train"), [drawing], IMAGE_SCHEMA, {"sources": ["emoji"]})
    check(plan_of(source(tmp_path / "set")), str(tmp_path / "images"))
    made(tmp_path / "set", tmp_path / "new")
    check(plan_of(tmp_path / "set"), str(tmp_path / "new"))


@pytest.mark.parametrize("spelling", ["relative", "absolute"])
@pytest.mark.parametrize("rule", ["old", "new"])
def test_a_takedown_list_fits_sets_of_either_rule_in_either_spelling(rule: str, spelling: str, tmp_path: Path) -> None:
    place, url = source(tmp_path / "set"), str(tmp_path / "images" / "train")
    if rule == "new":
        made(place, tmp_path / "images")
        victim = open_set(url, IMAGE_SCHEMA).rows_at([0])[0]["id"]
        assert not victim.startswith("/")
    else:
        victim = "00.png"
        old = [ImageRecord(f"{place}/{n:02d}.png", ["a cat"], picture(n), 16, 16, "s", "unknown", str(n), "train") for n in range(3)]
        write_set(url, [old], IMAGE_SCHEMA, {"sources": [str(place)]})
    (tmp_path / "list").write_text((victim if spelling == "relative" else f"{place}/{victim}") + "\nof-no-record\n")
    whole, opened = open_set(url, IMAGE_SCHEMA), open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "list"))
    assert opened.count == whole.count - 1
    purge = plan_purge(url, opened.taken_ids)
    assert purge is not None and purge.records == 1
    assert unmatched([url], takedown_lines(str(tmp_path / "list"))) == ["of-no-record"]
    summary = made(place, tmp_path / "anew", takedown=str(tmp_path / "list"))  # an old list on a new set, and the reverse above
    assert summary["dropped"]["taken down"]["count"] == 1
    assert summary["takedown"] == {"lines": 2, "without_match": 1, "examples": ["of-no-record"]}
    if rule == "new":  # parts that were written before the list hide the record, and match it too
        assert made(place, tmp_path / "images", takedown=str(tmp_path / "list"))["takedown"]["without_match"] == 1


def test_an_id_with_a_line_separator_in_it_is_one_line_of_a_list(tmp_path: Path) -> None:
    place, url = source(tmp_path / "set"), str(tmp_path / "images" / "train")
    identity = f"{place}/odd\u2028name\x0b.png"
    write_set(url, [[ImageRecord(identity, ["a cat"], picture(0), 16, 16, "s", "unknown", "g", "train")]], IMAGE_SCHEMA, {"sources": []})
    (tmp_path / "list").write_text(identity + "\n")
    assert open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "list")).count == 0


def test_spellings_know_the_names_of_sources_and_patterns() -> None:
    bases = bases_of({"sources": ["/data/one", "emoji", "s3://b/two/*.tar"]})
    assert bases == {"": "/data/one", "1": "s3://b/two"}
    assert spellings(frozenset({"/data/one/a.png", "1:x.tar/k", "plain"}), bases) == {
        *("/data/one/a.png", "a.png", "1:x.tar/k", "s3://b/two/x.tar/k", "/data/one/1:x.tar/k", "plain", "/data/one/plain")
    }


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "crlf", "cr", "utf-16", "utf-16-le", "latin-1"])
def test_a_takedown_list_of_any_editor_hides_its_first_record_or_is_refused(coding: str, tmp_path: Path) -> None:
    place, url = source(tmp_path / "set"), str(tmp_path / "images" / "train")
    made(place, tmp_path / "images")
    victim = open_set(url, IMAGE_SCHEMA).rows_at([0])[0]["id"]
    end = {"crlf": "\r\n", "cr": "\r"}.get(coding, "\n")
    other = "caf\xe9.png" if coding == "latin-1" else "x" * 10_000_000
    words = f"{victim}{end}{other}{end}"
    (tmp_path / "list").write_bytes(words.encode("utf-8" if coding in ("crlf", "cr") else coding))
    if coding.startswith("utf-16") or coding == "latin-1":
        with pytest.raises(DataError, match=r"list: not UTF-8 text \("):
            open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "list"))
        return
    assert open_set(url, IMAGE_SCHEMA, takedown=str(tmp_path / "list")).count == open_set(url, IMAGE_SCHEMA).count - 1
    summary = made(place, tmp_path / "anew", takedown=str(tmp_path / "list"))
    assert summary["dropped"]["taken down"]["count"] == 1 and len(json.dumps(summary["takedown"])) < 1000, "a line of 10 MB is named, not stored"
