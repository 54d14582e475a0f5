"""The stage 'prepare' and what fails under it: poisoned shards, kills, outages, full disks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.prepare import parts
from data_pipeline.prepare.drop_counts import Tally
from data_pipeline.prepare.merge import finish, state
from data_pipeline.prepare.plan import Plan
from data_pipeline.prepare.tries import Tries
from data_pipeline.sources.pairs import InputShard, Pair, Unreadable
from infra import deferred_writes, storage
from infra.errors import DataError, ExitCode, NoRoomError, ReportedError, UnchangingError, UnreachableError
from infra.world import World
from tests.support.data_faults import ATTEMPTS, impatient
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.s3_server import S3Server
from tests.support.shelf import Shelf, boxes, ids, run


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
    plan, asked = plan_of(Shelf(boxes(12, 12))), iter([False] * 36 + [True] * 50)  # twice a record: whether it is wanted, and then
    assert parts.run(plan, str(tmp_path), World.single(), stop=lambda: next(asked)).written == 1
    assert len(state(plan, str(tmp_path)).open) == 1 and not list((tmp_path / "tries").rglob("*.json"))
    run(plan, str(tmp_path))
    finish(plan, str(tmp_path))
    assert len(ids(str(tmp_path))) == 24


@pytest.mark.parametrize(("fields", "kinds"), [({"filters": {"min_words": 50}}, "filtered"), ({"share": 1e-9}, "unwanted"), ({}, "unreadable")])
def test_a_stop_is_heard_at_records_that_are_dropped_too(tmp_path: Path, plan_of: Callable[..., Plan], fields: dict[str, Any], kinds: str) -> None:
    """Of a set of which a thousandth passes, one that passes may be minutes away."""
    shelf = Shelf([[Unreadable(f"id-{number}", "damaged", "") for number in range(200)]] if kinds == "unreadable" else boxes(200))
    plan, tally, asked = plan_of(shelf, max_tries=1, **fields), Tally(), iter([False] * 10 + [True] * 300)
    with pytest.raises(parts.Stopped):
        list(parts.accepted(plan, plan.units[0], tally, stop=lambda: next(asked)))
    assert 3 < tally.seen <= 10 and sum(each["count"] for each in tally.dropped.values()) == tally.seen
    assert parts.run(plan, str(tmp_path), World.single(), stop=lambda: next(asked)).written == 0
    assert not list(tmp_path.rglob("*.json")), "neither a part nor a try"


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
