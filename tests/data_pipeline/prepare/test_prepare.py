"""Stage 'prepare': shares, splits, restarts, versions, quarantine, duplicates and the summary."""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import DataConfig, FilterConfig, SourceConfig
from data_pipeline.filters.captions import blocked_words
from data_pipeline.prepare import parts
from data_pipeline.prepare import plan as planning
from data_pipeline.prepare.merge import finish, state
from data_pipeline.prepare.plan import SPLITS, Plan, make_plan, split_of, spread
from data_pipeline.prepare.tries import Tries
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, open_set, read_takedown
from data_pipeline.sources.pairs import Census, InputShard, Pair, Unreadable
from infra import deferred_writes, storage
from infra.errors import DataError, ExitCode, NoRoomError, ReportedError, UnchangingError, UnreachableError
from infra.world import World
from tests.support.data_faults import ATTEMPTS, impatient
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.s3_server import S3Server


def picture(number: int, size: int = 24) -> bytes:
    """A picture unlike the others: noise in 4 x 4 blocks."""
    out = io.BytesIO()
    blocks = np.random.default_rng(number).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(out, "PNG")
    return out.getvalue()


def pair(number: int, **fields: Any) -> Pair:
    facts = {"id": f"id-{number}", "captions": (f"a red picture with number {number}",), "image": picture(number), "source": "shelf"}
    return Pair(**(facts | {"license": "CC0-1.0", "group": f"group-{number}"} | fields))


@dataclass
class Shelf:
    """A source in memory: shards of pairs, and what happens when a shard is read."""

    boxes: list[list[Pair | Unreadable]]
    broken: Mapping[int, str | Exception] = field(default_factory=dict)
    """Shard -> what reading it ends in; words are those of a DataError."""
    reads: list[str] = field(default_factory=list)
    name: str = "shelf"
    census: Census = field(default_factory=Census)

    def shards(self) -> Iterator[InputShard]:
        for number, box in enumerate(self.boxes):
            yield InputShard(f"box-{number}", f"{len(box)} pairs")

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        self.reads.append(shard.name)
        number = int(shard.name.removeprefix("box-"))
        for found in self.boxes[number]:
            if isinstance(found, Unreadable) or wanted(found.group):
                yield found
        error = self.broken.get(number)
        if error is not None:
            raise DataError(error) if isinstance(error, str) else error

    def version(self) -> str:
        return "shelf/1"

    def credits(self) -> dict[str, str]:
        return {"shelf": "Made for tests, CC0."}


def boxes(*sizes: int, first: int = 0) -> list[list[Pair | Unreadable]]:
    made: list[list[Pair | Unreadable]] = []
    for size in sizes:
        made.append([pair(first + number) for number in range(size)])
        first += size
    return made


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plans over shelves."""

    def make(*shelves: Shelf, filters: dict[str, Any] | None = None, seed: int = 0, **fields: Any) -> Plan:
        by_url = {f"shelf-{number}": shelf for number, shelf in enumerate(shelves)}
        monkeypatch.setattr(planning, "open_source", lambda entry, data: by_url[entry.url])
        data = DataConfig.model_validate({"sources": list(by_url), "validation_share": 0.25} | fields, strict=False)
        return make_plan(data, FilterConfig.model_validate(filters or {}), 16, seed)

    return make


def run(plan: Plan, url: str, ranks: int = 1) -> list[parts.Share]:
    return [parts.run(plan, url, World(rank, ranks, rank, ranks)) for rank in range(ranks)]


def open_splits(url: str, version: dict[str, Any] | None = None) -> dict[str, ShardSet]:
    versions = {split: version["splits"][split]["version"] if version else "" for split in SPLITS}
    return {split: open_set(storage.join(url, split), IMAGE_SCHEMA, version=versions[split]) for split in SPLITS}


def ids(url: str, version: dict[str, Any] | None = None) -> list[str]:
    return sorted(record["id"] for shard_set in open_splits(url, version).values() for record in shard_set.records())


def tree(url: Path) -> dict[str, str]:
    return {str(path.relative_to(url)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(url.rglob("*")) if path.is_file()}


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


def test_a_poisoned_shard_is_quarantined_after_its_tries_and_the_rest_goes_on(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    url, shelf = str(tmp_path), Shelf(boxes(12, 12, 12), broken={1: "box-1.tar: truncated"})
    plan = plan_of(shelf, max_tries=3)
    assert run(plan, url) == [parts.Share(3, written=2, quarantined=1)]
    assert shelf.reads.count("box-1") == 3 and shelf.reads[:3] == ["box-0", "box-1", "box-2"], "others come before a second try"
    summary = finish(plan, url)
    assert summary["quarantined"] == [{"shard": "box-1", "reason": "DataError: box-1.tar: truncated", "tries": 3}]
    assert ids(url) == sorted(f"id-{number}" for number in [*range(12), *range(24, 36)])
    assert run(plan, url) == [parts.Share(3, skipped=2, quarantined=1)] and shelf.reads.count("box-1") == 3
    shelf.broken = {}
    storage.delete_prefix(Tries(url, plan.inputs(plan.units[1])).url)  # what the message says
    assert run(plan, url) == [parts.Share(3, written=1, skipped=2)]
    assert finish(plan, url)["quarantined"] == [] and len(ids(url)) == 36


def test_a_shard_that_fails_once_is_tried_again_and_leaves_no_trace(
    tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(boxes(12, 12), broken={0: "a hiccup"})
    real = shelf.read

    def read(shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        yield from real(shard, wanted)

    def once(shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        monkeypatch.setattr(shelf, "read", read)
        try:
            yield from real(shard, wanted)
        finally:
            shelf.broken = {}

    monkeypatch.setattr(shelf, "read", once)
    plan = plan_of(shelf)
    assert run(plan, str(tmp_path)) == [parts.Share(2, written=2)]
    assert not (tmp_path / "tries").exists() or not list((tmp_path / "tries").rglob("*.json"))


def test_a_reader_that_is_killed_again_and_again_counts_as_tries(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    url, plan = str(tmp_path), plan_of(Shelf(boxes(12, 12)), max_tries=2)
    tries = Tries(url, plan.inputs(plan.units[0]))
    for number in range(2):
        tries.begin(number)  # and no more: kill -9
    assert run(plan, url) == [parts.Share(2, written=1, quarantined=1)]
    assert finish(plan, url)["quarantined"][0]["reason"] == "the process that read it was killed"


def test_when_too_many_shards_fail_the_stage_does(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    url, plan = str(tmp_path), plan_of(Shelf(boxes(8, 8, 8), broken=dict.fromkeys(range(3), "no network")), max_tries=1, max_quarantined=1)
    with pytest.raises(DataError, match=r"2 input shards could not be read .*no network.*, more than data.max_quarantined = 1; check the sources"):
        run(plan, url)
    lax = plan_of(Shelf(boxes(8, 8, 8), broken=dict.fromkeys(range(2), "no network")), max_tries=1, max_quarantined=2)
    run(lax, str(tmp_path / "lax"))
    assert len(finish(lax, str(tmp_path / "lax"))["quarantined"]) == 2
    with pytest.raises(DataError, match=r"2 input shards .*\(the last: box-1: DataError: no network\), more than data.max_quarantined = 1"):
        finish(plan_of(Shelf(boxes(8, 8, 8)), max_tries=1, max_quarantined=1), str(tmp_path / "lax"))


def test_a_stop_in_mid_shard_leaves_no_part_and_no_try(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    plan, asked = plan_of(Shelf(boxes(12, 12))), iter([False] * 20 + [True] * 50)
    assert parts.run(plan, str(tmp_path), World.single(), stop=lambda: next(asked)).written == 1
    assert len(state(plan, str(tmp_path)).open) == 1 and not list((tmp_path / "tries").rglob("*.json"))
    run(plan, str(tmp_path))
    finish(plan, str(tmp_path))
    assert len(ids(str(tmp_path))) == 24


@pytest.mark.parametrize("error", [UnreachableError("s3://b/box-1: failed after 6 attempts"), NoRoomError("/tmp/x: cannot be written")])
def test_an_outage_and_a_full_disk_end_the_process_and_leave_the_shard_untried(
    tmp_path: Path, plan_of: Callable[..., Plan], error: ReportedError
) -> None:
    shelf = Shelf(boxes(12, 12, 12), broken={1: error})
    plan = plan_of(shelf, max_tries=1)
    with pytest.raises(type(error)) as caught:
        run(plan, str(tmp_path))
    assert caught.value is error and caught.value.exit_code == ExitCode.CRASH and shelf.reads == ["box-0", "box-1"]
    shelf.broken = {}
    assert run(plan, str(tmp_path)) == [parts.Share(3, written=2, skipped=1)], "and not one quarantined"


def test_a_full_disk_under_a_part_is_none_of_the_shards_doing(tmp_path: Path, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plan = plan_of(Shelf(boxes(12)), max_tries=1)
    for name in ("streaming.MDSWriter.write", "streaming.MDSWriter.finish"):
        with monkeypatch.context() as patch, pytest.raises(NoRoomError, match=r"part-\w+: cannot be written \(No space left on device\); make room"):
            patch.setattr(name, full)
            run(plan, str(tmp_path))
    assert run(plan, str(tmp_path)) == [parts.Share(1, written=1)]


def test_an_outage_of_the_sets_own_storage_is_no_try_either(
    s3: str, s3_server: S3Server, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(Shelf(boxes(12)), max_tries=1)
    with fault_proxy(s3_server.endpoint) as proxy, impatient():
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        # No part can be written; the try cannot be taken back either, until the process has ended and its launcher looks at its notes.
        proxy.rules = [Rule("PUT .*/part-[0-9a-f]+/(shard|index|ids)", "503", -1), Rule("DELETE .*/tries/", "reset", ATTEMPTS)]
        with pytest.raises(UnreachableError, match="SlowDown"), deferred_writes.taking_notes():
            run(plan, s3)
        assert {kind for kind, _ in proxy.injected} == {"503", "reset"} and proxy.requests[-1].startswith("DELETE")
        proxy.rules = [Rule("PUT .*/part-[0-9a-f]+/(shard|index|ids)", "503", -1), Rule("DELETE .*/tries/", "reset", -1)]
        with pytest.raises(UnreachableError, match=r"/tries/.*failed after 3 attempts"):
            run(plan, s3)  # nobody takes notes: what counts now is said
        proxy.rules = []
        storage.delete_prefix(storage.join(s3, "tries"))
        assert run(plan, s3) == [parts.Share(1, written=1)]


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


def test_what_cannot_change_is_tried_once_and_every_shard_quarantined_names_the_first_reason(tmp_path: Path, plan_of: Callable[..., Plan]) -> None:
    shelf = Shelf(boxes(8, 8), broken=dict.fromkeys(range(2), UnchangingError("columns a, b are unknown.")))
    plan = plan_of(shelf, max_tries=3)
    run(plan, str(tmp_path))
    assert shelf.reads == ["box-0", "box-1"], "not three times each"
    with pytest.raises(
        DataError, match=r"none of the 2 input shards could be read\. The first, box-0: columns a, b are unknown\. Once that"
    ) as caught:
        finish(plan, str(tmp_path))
    assert "min_side" not in str(caught.value)


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
