"""Stage prepare: raw sources -> filtered image shards (``launcher.py prepare PRESET``)."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from data_pipeline import prepare
from infra.progress import Progress
from infra.run_folder import RunFolder, producer
from infra.signals import StopFlag
from infra.world import World
from train import places
from train.common import stop_together
from train.config import RunConfig
from train.device import set_up, wait_for_all


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Write this rank's parts; once all ranks have, merge the sets and mark the stage done."""
    started = time.monotonic()
    device = set_up(world)
    progress = Progress(0, "prepare", unit="records", enabled=world.is_main)

    def report(done: int, total: int) -> None:
        progress.total = total
        progress.update(done)

    where = places.images(cfg, run)
    prepare.run(cfg.data, cfg.dvae.image_size, cfg.run.seed, where, world, progress=report, stop=lambda: bool(stop))
    progress.finish()
    stop_together(stop, device, "prepare")
    if world.is_main:
        summary = prepare.finish(cfg.data, cfg.dvae.image_size, cfg.run.seed, where, producer())
        seconds = time.monotonic() - started
        summary = _for_people(summary)
        rate = sum(summary["splits"].values()) / seconds
        run.finish("prepare", seconds=seconds, world_size=world.size, throughput={"value": rate, "unit": "images/s"}, summary=summary)
    wait_for_all()


def _for_people(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as the report shows it: counts by split, source and reason."""
    sources: Counter[str] = Counter()
    for entry in summary["splits"].values():
        sources.update(entry["sources"])
    return {
        "splits": {split: entry["count"] for split, entry in summary["splits"].items()},
        "groups": {split: entry["groups"] for split, entry in summary["splits"].items()},
        "sources": dict(sources),
        "dropped": summary["reasons"],
        "credits": summary["credits"],
    }
