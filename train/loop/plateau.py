"""Halving the step size at plateaus of the training loss: deterministic, logged, resumable, and to be overruled by hand (paper B.2)."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


class Plateau:
    """Watches the mean training loss of windows of updates.

    A window that lies less than ``threshold`` (relative) below the best window since the last halving is one without progress; after ``patience`` of
    them in a row the step size is halved, at most ``halvings`` times. Every rank sees the same agreed losses, so all decide alike. The paper halves
    five times and does not say when; window, threshold and patience are ours.
    """

    def __init__(self, window: int, patience: int, threshold: float, halvings: int, warmup: int, at: tuple[int, ...] | None = None) -> None:
        """
        Args:
            window: updates of a window.
            patience: windows without progress that make a plateau.
            threshold: smallest relative progress that counts.
            halvings: largest number of halvings.
            warmup: updates at the start that are not looked at.
            at: by hand: halve after exactly these updates, and look at nothing; None: look.
        """
        self.window, self.patience, self.threshold, self.limit, self.warmup = window, patience, threshold, halvings, warmup
        self.at = None if at is None else tuple(sorted(at))
        self.halved: list[int] = []
        """Updates after which the step size was halved."""
        self._best: float | None = None
        self._idle = 0
        self._sum, self._count = 0.0, 0

    @property
    def factor(self) -> float:
        """What to multiply the step size by."""
        return 0.5 ** len(self.halved)

    def observe(self, step: int, loss: float) -> bool:
        """Take in the loss of update ``step`` (1 is the first); True if the step size is halved after it. Losses that are not finite are left out."""
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
        """Begin anew after ``step`` updates, as at the start of a run; halvings by hand stay, they name updates."""
        if self.at is None:
            self.halved, self._best, self._idle, self._sum, self._count = [], None, 0, 0.0, 0
        self.begin_at(step)

    def begin_at(self, step: int) -> None:
        """The warm-up begins after ``step`` updates."""
        self.warmup += step

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able, exact."""
        return {"halved": self.halved, "best": self._best, "idle": self._idle, "sum": self._sum, "count": self._count}

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Go on from a checkpoint's state after ``step`` updates; halvings by hand that lie before it count as done."""
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
