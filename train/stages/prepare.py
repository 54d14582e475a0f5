"""Stage prepare: data sources -> filtered image shards (``launcher.py prepare PRESET``)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any

from data_pipeline.prepare import parts
from data_pipeline.prepare.identity import check
from data_pipeline.prepare.merge import finish, state
from data_pipeline.prepare.plan import Plan
from infra.progress import Progress
from infra.run_folder import RunFolder, producer
from infra.signals import StopFlag
from infra.world import Share, World
from train.config import RunConfig
from train.ranks.device import set_up, wait_for_all
from train.run import places
from train.stages.finish import stop_together
from train.stages.prepare_preview import plan_of

log = logging.getLogger(__name__)


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Write this rank's parts. Once all exist, those of other launchers included, merge the sets and mark the stage as done."""
    started = time.monotonic()
    device = set_up(world)
    share = Share.from_env()
    progress = Progress(0, "prepare", unit="shards", timed=True, enabled=world.is_main)

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.update(done)

    where, plan = places.images(cfg, run), plan_of(cfg)
    check(plan, where)
    stop.orderly("the writing of a part")
    mine = parts.run(plan, where, share.of(world), progress=report, stop=lambda: bool(stop))
    progress.finish()
    if mine.recognised:
        log.info("prepare: %d inputs are what they were but for their time or ETag; their parts stay.", mine.recognised)
    stop_together(stop, device, "prepare")
    stop.phase("the merging of the parts")  # if it is stopped, the next start repeats it
    if world.is_main:
        left = len(state(plan, where).open) if share.count > 1 else 0
        if left:
            print(
                f"prepare: this share is done; {left} of {len(plan.units)} input shards are left to others, and the last of them merges.", flush=True
            )
        else:
            _finish(run, plan, where, started, world)
    wait_for_all()


def _finish(run: RunFolder, plan: Plan, where: str, started: float, world: World) -> None:
    summary = finish(plan, where, producer())
    versions = {split: entry["version"] for split, entry in summary["splits"].items()}
    seconds = time.monotonic() - started
    people = _for_people(summary)
    if missed := people.get("takedown", {}).get("without_match", 0):
        examples = ", ".join(map(ascii, people["takedown"]["examples"]))
        log.warning("%s: %d of %d lines name no record: %s", plan.data.takedown, missed, people["takedown"]["lines"], examples)
    rate = {"value": sum(people["splits"].values()) / seconds, "unit": "images/s"}
    run.finish("prepare", seconds=seconds, world_size=world.size, throughput=rate, summary=people, versions=versions)


def _for_people(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary in the form that the report shows: counts by split, source and reason."""
    sources: Counter[str] = Counter()
    for entry in summary["splits"].values():
        sources.update(entry["sources"])
    return {
        "seen": summary["seen"],
        "splits": {split: entry["count"] for split, entry in summary["splits"].items()},
        "groups": {split: entry["groups"] for split, entry in summary["splits"].items()},
        "sources": dict(sources),
        "dropped": summary["dropped"],
        "dropped_captions": summary["dropped_captions"],
        "quarantined": summary["quarantined"],
        "credits": summary["credits"],
        "files": summary["files"],
        "not_read": summary.get("not_read", {}),
    } | ({"takedown": summary["takedown"]} if "takedown" in summary else {})
