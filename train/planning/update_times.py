"""The parts of an update's time, and how they add up. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of an update."""

    compute: float
    optimizer: float
    inside: float
    """Of messages within machines, but for ``gathering``; ``outside`` is the same between machines."""
    outside: float
    gathering: float = 0.0
    """On stages 1 and 2 parameters are gathered after the update, and nothing hides that."""
    compressing: float = 0.0
    """Time of the products and factorisations of compression."""
    is_exposed: bool = False
    """Whether communication between machines begins only after the backward pass. A machine's shards are summed over machines when they are complete, and ZeRO does not
    tell before the end of the backward pass that any of them is (train/engines/zero/DEEPSPEED.md)."""
    latency: float = 0.0
    """Of all messages, where it is known."""
    overlaps: bool = True
    """Whether messages of the passes are sent while these go on: DeepSpeed does that with zero.overlap_comm alone."""

    @property
    def expected(self) -> float:
        """Seconds if communication overlaps with computation as far as it can as configured."""
        if not self.overlaps:
            return self.unhidden
        if self.is_exposed:
            return max(self.compute, self.inside) + self.outside + self.compressing + self.after
        return max(self.compute, self.inside, self.outside) + self.after

    @property
    def after(self) -> float:
        """Seconds that nothing hides."""
        return self.optimizer + self.gathering + self.latency

    @property
    def unhidden(self) -> float:
        """Seconds if communication does not overlap with computation."""
        return self.compute + self.inside + self.outside + self.compressing + self.after

    @property
    def overlapped(self) -> float:
        """Seconds if communication between machines overlapped too, as in the paper."""
        return max(self.compute + self.compressing, self.inside, self.outside) + self.after
