"""Halves the learning rate when the training loss stops falling (paper B.2). Deterministic, logged and resumable; halvings can also be given by hand."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class Plateau:
    """Watches the mean training loss over windows of updates.

    A window whose mean is not at least ``threshold`` (relative) below the best window since the last halving counts as one without progress. After ``patience``
    such windows in a row the learning rate is halved, at most ``halvings`` times. Every rank gets the same reduced loss, so all ranks decide the same. The paper
    halves five times and does not say when; window, threshold and patience are our choice.
    """

    def __init__(self, window: int, patience: int, threshold: float, halvings: int, warmup: int, at: tuple[int, ...] | None = None) -> None:
        """
        Args:
            window: number of updates in a window.
            patience: number of windows without progress in a row that make a plateau.
            threshold: smallest relative decrease that counts as progress.
            halvings: largest number of halvings.
            warmup: number of updates at the start that are ignored.
            at: halve after exactly these updates, whatever the loss does; None: decide by the loss.
        """
        self.window, self.patience, self.threshold, self.limit, self.warmup = window, patience, threshold, halvings, warmup
        self.at = None if at is None else tuple(sorted(at))
        self.halved: list[int] = []
        """Updates after which the learning rate was halved."""
        self._best: float | None = None
        self._idle = 0
        self._sum, self._count = 0.0, 0

    @property
    def factor(self) -> float:
        """What to multiply the learning rate by."""
        return 0.5 ** len(self.halved)

    def observe(self, step: int, loss: float) -> bool:
        """Take note of the loss of update ``step`` (1 is the first); return whether the learning rate is halved after it. Losses that are not finite are
        left out."""
        if self.at is not None:
            return step in self.at and step not in self.halved and self._halve(step, "by hand")
        if step <= self.warmup or len(self.halved) >= self.limit:
            return False
        if loss - loss == 0.0:
            self._sum, self._count = self._sum + loss, self._count + 1
        if (step - self.warmup) % self.window or not self._count:
            return False
        mean, self._sum, self._count = self._sum / self._count, 0.0, 0
        if self._best is None or mean < self._best - self.threshold * abs(self._best):
            self._best, self._idle = mean, 0
            return False
        self._idle += 1
        return self._idle >= self.patience and self._halve(step, f"mean loss {mean:.6g} after a best of {self._best:.6g}")

    def _halve(self, step: int, why: str) -> bool:
        self.halved.append(step)
        self._best, self._idle = None, 0
        log.info("step size halved after update %d (%d of %d): %s", step, len(self.halved), self.limit, why)
        return True

    def restart(self, step: int) -> None:
        """Forget everything after ``step`` updates, as at the start of a run. Halvings by hand stay: they are given as numbers of updates."""
        if self.at is None:
            self.halved, self._best, self._idle, self._sum, self._count = [], None, 0, 0.0, 0
        self.begin_at(step)

    def begin_at(self, step: int) -> None:
        """Let the warm-up begin after ``step`` updates."""
        self.warmup += step

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: JSON values that restore the exact state."""
        return {"halved": self.halved, "best": self._best, "idle": self._idle, "sum": self._sum, "count": self._count}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue from a checkpoint's state after ``step`` updates. Halvings by hand at or before that update count as made."""
        self.halved = list(state["halved"])
        self._best, self._idle, self._sum, self._count = state["best"], state["idle"], state["sum"], state["count"]
        if self.at is not None:
            halved, self.halved = self.halved, [update for update in self.at if update <= step]
            if halved != self.halved:
                log.warning(
                    "step size by hand: halved after %s, and no longer after %s: it is %g times what it was",
                    self.halved,
                    halved,
                    2.0 ** (len(halved) - len(self.halved)),
                )
