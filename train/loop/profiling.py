"""Profiles of chosen updates (key ``profile``): a trace of torch's profiler and on a GPU a snapshot of its memory for each chosen rank, and the phases of all ranks.

    <run>/<stage>/profile/update-<n>/trace-rank-<r>.json.gz     chrome://tracing, ui.perfetto.dev
                                     memory-rank-<r>.pickle     of torch, for pytorch.org/memory_viz
    <run>/<stage>/profile/phases.json  gantt.html               of all updates profiled so far (train/loop/gantt.py)

Off unless updates are named. Nothing that is computed changes: no bit of a loss.
"""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra import scratch, storage
from infra.run_folder import RunFolder
from infra.world import World
from train.config import FitSection
from train.loop import gantt
from train.loop.gantt import Part
from train.loop.phases import Phases
from train.ranks.device import patient_group

log = logging.getLogger(__name__)

_HISTORY = 100_000  # allocations that a snapshot of memory tells of


class Profiler:
    """Of one attempt at a stage.

    Args:
        start: updates made before: those that were chosen among them are not made again.
    """

    def __init__(self, run: RunFolder, stage: str, section: FitSection, world: World, device: torch.device, start: int) -> None:
        self._run, self._stage, self._world, self._gpu = run, stage, world, device.type == "cuda"
        self._updates = frozenset(step for step in section.profile if step > start)
        self._traces = not section.profile_ranks or world.rank in section.profile_ranks
        self._gathered: dict[int, list[list[Part]]] = {}
        passed = sorted(set(section.profile) - self._updates)
        if passed and world.is_main:
            log.warning("%s: %s_fit.profile names updates that are past: %s; the next is %d", stage, stage, ", ".join(map(str, passed)), start + 1)

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """An update: traced if it is one of those."""
        if step not in self._updates or not self._traces:
            yield
            return
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if self._gpu else [])]
        if self._gpu:
            torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
        else:  # else the profiler's library says on every rank, as an error, that it counts no GPU
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        with torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True) as profile:
            yield
        self._write(step, profile)

    def _write(self, step: int, profile: Any) -> None:
        place = self._run.at(self._stage, "profile", f"update-{step:08d}")
        with scratch.folder("profile-") as folder:
            trace = Path(folder, "trace.json")
            profile.export_chrome_trace(str(trace))
            storage.write_bytes(storage.join(place, f"trace-rank-{self._world.rank}.json.gz"), gzip.compress(trace.read_bytes()))
            if self._gpu:
                memory = Path(folder, "memory.pickle")
                torch.cuda.memory._dump_snapshot(str(memory))
                torch.cuda.memory._record_memory_history(enabled=None)
                storage.upload_file(memory, storage.join(place, f"memory-rank-{self._world.rank}.pickle"))

    def ended(self, step: int, phases: Phases) -> None:
        """All that belongs to an update has ended, its save included. Collective, where it is one of those."""
        if step not in self._updates:
            return
        mine = set_by_message(phases.parts)
        gathered: list[Any] = [mine]
        if self._world.size > 1 and dist.is_initialized():
            gathered = [None] * self._world.size
            dist.all_gather_object(gathered, mine, group=patient_group())
        self._gathered[step] = gathered
        if self._world.is_main:
            self._show(step)

    def _show(self, step: int) -> None:
        url = self._run.at(self._stage, "profile", "phases.json")
        known = gantt.read(storage.read_json(url)) if storage.exists(url) else {}
        together = {update: ranks for update, ranks in known.items() if update <= step} | self._gathered
        storage.write_json(url, {str(update): ranks for update, ranks in sorted(together.items())})
        page = self._run.at(self._stage, "profile", "gantt.html")
        storage.write_text(page, gantt.page(self._stage, together))
        log.info("%s: update %d was profiled: %s", self._stage, step, page)


def set_by_message(parts: list[Part]) -> list[Part]:
    """Parts with times since the end of the step's message, the last wait for others: it comes to all ranks at about the same moment, whatever their clocks say."""
    moment = max((end for name, _, end in parts if name == "reduce"), default=0.0)
    return [(name, begin - moment, end - moment) for name, begin, end in parts]
