"""Dynamic loss scaling for fp16 gradients: one global scale ("standard global loss scaling", paper A.2)."""

from __future__ import annotations

from typing import Any

_FIRST, _LARGEST, _SMALLEST = 2.0**16, 2.0**24, 1.0
_GROWTH_EVERY = 2000


class LossScale:
    """A scale that is halved when gradients overflow, and doubled after ``growth_every`` updates without an overflow. It is a power of two, so scaling is exact.

    It is the same on every rank, because all ranks see the same reduced gradients.
    """

    def __init__(self, value: float = _FIRST, growth_every: int = _GROWTH_EVERY) -> None:
        self.value, self.growth_every = value, growth_every
        self.skipped = 0
        """Updates skipped because gradients overflowed."""
        self._good = 0

    def update(self, *, finite: bool) -> bool:
        """Adapt the scale after an update. True if gradients overflowed and a smaller scale may help. False at the smallest scale: then the gradients themselves are
        not finite."""
        if finite:
            self._good += 1
            if self._good == self.growth_every:
                self.value, self._good = min(_LARGEST, 2 * self.value), 0
            return False
        self.skipped += 1
        self._good = 0
        smaller = self.value > _SMALLEST
        self.value = max(_SMALLEST, self.value / 2)
        return smaller

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores, as JSON values."""
        return {"value": self.value, "good": self._good, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.value, self._good, self.skipped = float(state["value"]), int(state["good"]), int(state["skipped"])
