"""Stage 'prepare': shares, splits, restarts, versions, quarantine, duplicates and the summary."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig, FilterConfig, SourceConfig
from data_pipeline.filters.captions import blocked_words
from data_pipeline.prepare import parts
from data_pipeline.prepare.merge import finish, state
from data_pipeline.prepare.plan import SPLITS, Plan, make_plan, split_of, spread
from data_pipeline.shards.spellings import read_takedown
from data_pipeline.sources.pairs import Pair, Unreadable
from infra import storage
from infra.errors import DataError
from infra.world import World
from tests.support.shelf import Shelf, boxes, ids, open_splits, pair, picture, run, tree


def test_every_pair_lands_once_in_the_split_of_its_group(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    url, plan = str(tmp_path), plan_of(Shelf(boxes(30, 30)))
    assert run(plan, url) == [parts.Share(2, written=2)]
    summary = finish(plan, url)
    records = {split: list(shard_set.records()) for split, shard_set in open_splits(url).items()}
    assert ids(url) == sorted(f"id-{number}" for number in range(60))
    for split in SPLITS:
        assert all(record["split"] == split == split_of(record["group"], 0, 0.25) for record in records[split])
        entry = summary["splits"][split]
        assert (entry["count"], entry["groups"], entry["sources"]) == (len(records[split]), len(records[split]), {"shelf": len(records[split])})
        assert entry["licenses"] == {"CC0-1.0": len(records[split])}
    assert summary["seen"] == 60 and 5 <= summary["splits"]["validation"]["count"] <= 25
    assert (records["train"][0]["width"], records["train"][0]["height"]) == (24, 24)
    assert (summary["credits"], summary["groups_in_both"], summary["dropped"]) == (["Made for tests, CC0."], 0, {})
    assert storage.read_json(f"{url}/summary.json") == summary


def test_any_number_of_ranks_and_any_restart_write_the_same_bytes(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(Shelf(boxes(8, 8, 8, 8, 8)))
    run(plan, str(tmp_path / "one"))
    assert [share.written for share in run(plan, str(tmp_path / "three"), ranks=3)] == [2, 2, 1]
    markers = sorted((tmp_path / "three" / "train").glob("part-*/done.json"))
    markers[1].unlink()  # as if killed between shards and marker
    (markers[3].parent / "shard.00000.mds").write_bytes(b"half")
    markers[3].unlink()
    assert sum(share.written for share in run(plan, str(tmp_path / "three"), ranks=2)) == 2
    for name in ("one", "three"):
        finish(plan, str(tmp_path / name))
    assert tree(tmp_path / "one") == tree(tmp_path / "three")
    before = tree(tmp_path / "one")
    assert run(plan, str(tmp_path / "one")) == [parts.Share(5, skipped=5)]
    finish(plan, str(tmp_path / "one"))
    assert tree(tmp_path / "one") == before


def test_growing_and_shrinking_moves_no_sample_redoes_nothing_and_keeps_versions(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    url, first, second = str(tmp_path), Shelf(boxes(12, 12)), Shelf(boxes(12, first=100))
    small = plan_of(first)
    run(small, url)
    old = finish(small, url)
    before = {record["id"]: record["split"] for shard_set in open_splits(url).values() for record in shard_set.records()}
    grown = plan_of(first, second)
    assert run(grown, url) == [parts.Share(3, written=1, skipped=2)]
    new = finish(grown, url)
    after = {record["id"]: record["split"] for shard_set in open_splits(url).values() for record in shard_set.records()}
    assert len(after) == 36 and before.items() <= after.items()
    assert len(ids(url, old)) == 24, "a run that pinned the old version still reads it"
    shrunk = plan_of(first)
    assert run(shrunk, url) == [parts.Share(2, skipped=2)]
    assert finish(shrunk, url)["splits"] == old["splits"] != new["splits"]


def test_a_change_of_a_filter_redoes_parts_and_one_of_duplicates_does_not(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    url, shelf = str(tmp_path), Shelf(boxes(12, 12))
    run(plan_of(shelf), url)
    assert run(plan_of(shelf, filters={"duplicates": False}), url) == [parts.Share(2, skipped=2)]
    assert run(plan_of(shelf, min_side=20), url) == [parts.Share(2, written=2)]
    assert run(plan_of(shelf, sources=[{"url": "shelf-0", "weight": 2.0}]), url) == [parts.Share(2, skipped=2)]


def test_dropped_pairs_are_counted_with_examples(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    good = boxes(20)[0]
    wide = io.BytesIO()
    Image.new("RGB", (90, 30)).save(wide, "PNG")
    bad: list[Pair | Unreadable] = [
        pair(100, image=b"no image"),
        pair(101, image=wide.getvalue()),
        *(Unreadable(f"missing-{number}", "missing image") for number in range(7)),
    ]
    plan = plan_of(Shelf([good + bad]))
    run(plan, str(tmp_path))
    summary = finish(plan, str(tmp_path))
    assert summary["seen"] == 29 and len(ids(str(tmp_path))) == 20
    assert summary["dropped"]["missing image"] == {"count": 7, "examples": [{"id": f"missing-{n}", "why": ""} for n in range(5)]}
    assert [example["id"] for example in summary["dropped"]["undecodable image"]["examples"]] == ["id-100"]
    (example,) = summary["dropped"]["aspect ratio"]["examples"]
    assert example["id"] == "id-101" and "90 x 30" in example["why"]


def test_a_filter_that_breaks_on_a_record_costs_that_record_alone(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = parts.judge

    def touchy(found: Pair, *rest: Any) -> Any:
        if found.id == "id-3":
            raise RecursionError("too deep")
        return real(found, *rest)

    monkeypatch.setattr(parts, "judge", touchy)
    plan = plan_of(Shelf(boxes(20)))
    run(plan, str(tmp_path))
    dropped = finish(plan, str(tmp_path))["dropped"]
    assert dropped == {"a filter failed": {"count": 1, "examples": [{"id": "id-3", "why": "RecursionError: too deep"}]}}


def test_a_share_of_groups_is_stable_and_is_asked_for_before_images_are_read(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    half, most = (plan_of(Shelf(boxes(40)), share=share) for share in (0.5, 0.8))
    for plan, name in ((half, "half"), (most, "most")):
        run(plan, str(tmp_path / name))
        finish(plan, str(tmp_path / name))
    assert 10 < len(ids(str(tmp_path / "half"))) < 30
    assert set(ids(str(tmp_path / "half"))) < set(ids(str(tmp_path / "most")))


def test_a_source_keeps_the_split_that_it_brings(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    box: list[Pair | Unreadable] = [pair(number, split="validation" if number < 3 else "train", group=f"g{number % 5}") for number in range(20)]
    plan = plan_of(Shelf([box]))
    run(plan, str(tmp_path))
    summary = finish(plan, str(tmp_path))
    assert sorted(record["id"] for record in open_splits(str(tmp_path))["validation"].records()) == ["id-0", "id-1", "id-2"]
    assert summary["groups_in_both"] == 3, "the report warns of groups that such a split tears apart"


def test_an_unfinished_unit_and_an_empty_split_are_named(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(Shelf(boxes(12, 12)))
    parts.run(plan, str(tmp_path), World(0, 2, 0, 2))
    with pytest.raises(DataError, match=r"1 of 2 parts are not finished \(part-[0-9a-f]{16}\); run the stage 'prepare' again"):
        finish(plan, str(tmp_path))
    assert len(state(plan, str(tmp_path)).open) == 1
    large = plan_of(Shelf(boxes(12)), min_side=1000)
    run(large, str(tmp_path))
    with pytest.raises(
        DataError, match=r"no record in the train split \(12 pairs read; dropped: image too small: 12\). Add larger images, or lower data.min_side"
    ):
        finish(large, str(tmp_path))


def test_taken_down_records_enter_no_new_part(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    (tmp_path / "list").write_text("id-4\n")
    plan = plan_of(Shelf(boxes(20)), takedown=str(tmp_path / "list"))
    run(plan, str(tmp_path / "set"))
    assert finish(plan, str(tmp_path / "set"))["dropped"]["taken down"]["count"] == 1
    assert "id-4" not in ids(str(tmp_path / "set"))


def test_duplicates_are_found_across_parts_and_splits(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    brought = {"split": "train"}
    first: list[Pair | Unreadable] = [pair(number, split="validation" if number < 4 else "train") for number in range(12)]
    second: list[Pair | Unreadable] = [
        pair(5, image=picture(50), captions=("another picture of the same id",), **brought),
        pair(21, image=picture(6), captions=("a red picture with number 6",), **brought),  # the same image and captions
        pair(22, image=picture(7), captions=("the same image under other words",), **brought),
        pair(23, image=picture(2), captions=("an image of the validation split",), **brought),
        pair(24, **brought),
    ]
    url = str(tmp_path)
    off = {"near_duplicate_bits": -1, "validation_overlap": False}
    plain = plan_of(Shelf([first, second]), filters=off)
    run(plain, url)
    summary = finish(plain, url)
    assert summary["dropped"] == {
        "repeated id": {"count": 1, "examples": [{"id": "id-5", "why": "repeats id-5"}]},
        "exact duplicate": {"count": 1, "examples": [{"id": "id-21", "why": "repeats id-6"}]},
    }
    assert "id-21" not in ids(url) and len(ids(url)) == 15
    strict = plan_of(Shelf([first, second]), filters={"validation_overlap": True, "near_duplicate_bits": 0})
    assert run(strict, url) == [parts.Share(2, skipped=2)], "a search among all parts does no part again"
    dropped = finish(strict, url)["dropped"]
    assert dropped["near-duplicate image"] == {"count": 1, "examples": [{"id": "id-22", "why": "repeats id-7"}]}
    assert dropped["overlaps validation"] == {"count": 1, "examples": [{"id": "id-23", "why": "repeats id-2"}]}
    assert len(ids(url)) == 13 and len(ids(url, summary)) == 15


def test_a_sample_is_spread_over_the_units(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(Shelf(boxes(*[1] * 10)))
    assert [unit.shard.name for unit in spread(plan.units, 5)] == ["box-0", "box-2", "box-4", "box-6", "box-8"]
    assert len(list(spread(plan.units, 50))) == 10


def test_a_list_that_is_missing_names_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"filters\.blocked_words = .*none\.txt: does not exist; name a text file"):
        blocked_words(str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match=r"data\.takedown = .*none\.txt: does not exist; name a text file"):
        read_takedown(str(tmp_path / "none.txt"))


def test_credits_name_licences_of_records_or_say_that_there_are_none(tmp_path: Path) -> None:
    for name, license in (("told", "CC-BY-4.0"), ("untold", "")):
        rows = [
            json.dumps({"image": f"{number}.png", "caption": f"a {name} picture of {number} things"} | ({"license": license} if license else {}))
            for number in range(24)
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.jsonl").write_text("\n".join(rows))
        for number in range(24):
            Image.fromarray(np.random.default_rng([number, len(name)]).integers(0, 255, (32, 32, 3), np.uint8)).save(
                tmp_path / name / f"{number}.png"
            )
    data = DataConfig(sources=tuple(SourceConfig(url=str(tmp_path / name)) for name in ("told", "untold")), validation_share=0.3)
    plan = make_plan(data, FilterConfig(near_duplicate_bits=-1), 16, 0)
    run(plan, str(tmp_path / "set"))
    told, untold = finish(plan, str(tmp_path / "set"))["credits"]
    assert (
        told
        == f"Images and captions from {tmp_path}/told: licences by its records: CC-BY-4.0 (24 records); the author stands with each record, if anywhere."
    )
    assert untold == f"Images and captions from {tmp_path}/untold: the source gave neither author nor licence."
