"""What the training loop tells those who watch it: a line or a bar, and signs of life with loss, speed and stragglers."""

from __future__ import annotations

import time
from collections import deque
from statistics import median

import torch

from infra import live
from infra.progress import Progress
from infra.world import World
from train.config import FitSection
from train.loop.phases import Phases
from train.loop.stragglers import Stragglers

_REMEMBERED = 1000  # updates that the median of speeds is taken of
_RECENT = 10
_LOOK_S = 1.0  # between two looks at the median
_NAMED = 5  # stragglers that a sign of life names


class Watched:
    """The loop's side of it.

    Args:
        start: updates made before.
    """

    def __init__(self, stage: str, section: FitSection, world: World, device: torch.device, start: int) -> None:
        self._main = world.is_main
        self.phases = Phases(device)
        every = section.lines_every
        self._progress = Progress(section.steps, stage, every=every, timed=True, start=start, enabled=world.is_main)
        self._stragglers = Stragglers(stage, world.size, section.log_every) if world.is_main and world.size > 1 else None
        self._rates: deque[float] = deque(maxlen=_REMEMBERED)
        self._due = 0.0

    def updated(self, step: int, seconds: float, loss: float, skipped: int, own_s: list[float]) -> dict[str, float]:
        """An update was made; what of it belongs to the metrics.

        Args:
            step: updates made by now.
            own_s: each rank's own work in the update before; empty where there is one rank.
        """
        found: dict[str, float] = {}
        if self._stragglers is not None and own_s and self._stragglers.observe(own_s):
            found = {"perf/slowest_rank_over_median": self._stragglers.slowest}
        self._rates.append(1 / max(seconds, 1e-9))
        if self._main:
            now = time.monotonic()
            if now >= self._due:
                self._due = now + _LOOK_S
                slow = [list(each) for each in (self._stragglers.found if self._stragglers is not None else [])[:_NAMED]]
                live.say(loss=loss, skipped=skipped, of_median=speed_of_median(self._rates), usual_s=1 / median(self._rates), slow=slow)
        self._progress.update(step, loss=loss, skipped=skipped)
        return found

    def finish(self) -> None:
        """The last update was made."""
        self._progress.finish()


def speed_of_median(rates: deque[float]) -> float:
    """Mean speed of the last updates over the median of all that are remembered; the first one, which compiles, counts as little as any other."""
    recent = [rates[i] for i in range(max(0, len(rates) - _RECENT), len(rates))]
    return len(recent) / sum(1 / rate for rate in recent) / median(rates)
