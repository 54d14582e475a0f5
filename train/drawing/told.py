"""How far a drawing is: said only of one that takes longer than a person waits without wondering."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from infra.progress import Progress

PATIENCE_S = 5.0
"""Seconds of drawing before anything is said."""
_LOOK_S = 0.2
"""Seconds between two looks: on a GPU a look waits for it."""


class Told:
    """Progress on standard error, from the first look after ``PATIENCE_S`` on."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + PATIENCE_S
        self._progress: Progress | None = None
        self._done: Callable[[], int] = int

    def look(self, done: Callable[[], int], total: int) -> None:
        """Say how many codes are drawn, if it is time to.

        Args:
            done: counts them; called only then.
            total: codes of all pictures that this command draws.
        """
        now, self._done = self._clock(), done
        if now < self._next:
            return
        self._next = now + _LOOK_S
        count = done()
        if self._progress is None:
            self._progress = Progress(total, "draw", "codes", start=count, clock=self._clock)
        self._progress.update(count)

    def finish(self) -> None:
        """End the line or the bar, if there is one."""
        if self._progress is not None:
            self._progress.update(self._done())
            self._progress.finish()


def say_compiling(device: torch.device, say: Callable[[str], None]) -> None:
    """On a CPU, let the first compilation of a kernel say why the user waits. Later commands find the kernels on disk."""
    if device.type == "cpu":
        from train.drawing import cpu_kernels  # numba takes a second to import, and only CPUs need it

        cpu_kernels.when_compiling(lambda: say("compiling the kernels of drawing for this machine: once, tens of seconds ..."))
