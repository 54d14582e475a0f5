"""Ranks that keep the others waiting, by the seconds of own work that each sends along with the step's message."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from statistics import median_low

import numpy as np

log = logging.getLogger(__name__)

SLOW = 1.5
"""Times the median of all ranks' own work, from which on a rank is called slow."""
LEAST_S = 0.01
"""Seconds over the median: what is shorter costs nobody anything."""
IN_A_ROW = 3
"""Looks in a row after which a rank is named in the log, once: what lasts is worth a line."""
LASTS_S = 10.0
"""And so many seconds of them: where updates take milliseconds and the machine is busy, three slow ones in a row come every other second, of any rank."""


def slow(own_s: Sequence[float]) -> list[tuple[int, float]]:
    """Slow ranks and how many times the median they take, the slowest first."""
    if len(own_s) < 2:
        return []
    usual = median_low(own_s)
    found = [(rank, seconds / max(usual, 1e-9)) for rank, seconds in enumerate(own_s) if seconds > SLOW * usual and seconds - usual > LEAST_S]
    return sorted(found, key=lambda each: -each[1])


class Stragglers:
    """Means of own work over some updates; the main rank's.

    Args:
        stage: named in the log.
        ranks: how many there are.
        every: updates that a look is taken over.
    """

    def __init__(self, stage: str, ranks: int, every: int) -> None:
        self._stage, self._every = stage, every
        self._sums, self._count = np.zeros(ranks), 0
        self._in_a_row: dict[int, int] = {}
        self._since: dict[int, float] = {}
        self._named: set[int] = set()
        self.found: list[tuple[int, float]] = []
        """Of the last look."""
        self.slowest = 1.0
        """Own work of the slowest rank over the median's, at the last look."""

    def observe(self, own_s: Sequence[float]) -> bool:
        """Take in an update; whether a look was taken."""
        self._sums += own_s
        self._count += 1
        if self._count < self._every:
            return False
        means = (self._sums / self._count).tolist()
        self._sums[:], self._count = 0.0, 0
        self.slowest = max(means) / max(median_low(means), 1e-9)
        self.found = slow(means)
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank, _ in self.found}
        now = time.monotonic()
        self._since = {rank: self._since.get(rank, now) for rank in self._in_a_row}
        self._named &= self._in_a_row.keys()
        for rank, times in self.found:
            if self._in_a_row[rank] >= IN_A_ROW and now - self._since[rank] >= LASTS_S and rank not in self._named:
                self._named.add(rank)
                log.warning(
                    "%s: rank %d is slow: its own work takes %.1f times the median of %d ranks, and all wait for it",
                    self._stage,
                    rank,
                    times,
                    len(means),
                )
        return True
