"""Stage report: writes report.html from the files of a run (``launcher.py report PRESET``)."""

from __future__ import annotations

import time

from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.report.page import build


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Write report.html and mark the stage as done."""
    started = time.monotonic()
    stop.phase("the writing of the report")
    url = build(run.url)
    run.finish("report", seconds=time.monotonic() - started, world_size=1, summary={"report": url})
