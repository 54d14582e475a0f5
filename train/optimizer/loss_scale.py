"""Dynamic loss scaling for fp16 gradients: one global scale ("standard global loss scaling", paper A.2)."""

from __future__ import annotations

from typing import Any

_FIRST, _LARGEST, _SMALLEST = 2.0**16, 2.0**24, 1.0
_GROWTH_EVERY = 2000


class LossScale:
    """Halved when gradients overflow, doubled after ``growth_every`` updates without one. Powers of two: scaling rounds nothing.

    The same on every rank, because all see the same reduced gradients.
    """

    def __init__(self, value: float = _FIRST, growth_every: int = _GROWTH_EVERY) -> None:
        self.value, self.growth_every = value, growth_every
        self.skipped = 0
        """Updates skipped because gradients overflowed."""
        self._good = 0

    def update(self, *, finite: bool) -> bool:
        """Take in the fate of an update. True if gradients overflowed and a smaller scale may help: at the smallest one the numbers themselves are bad."""
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
        """What a checkpoint keeps; JSON-able."""
        return {"value": self.value, "good": self._good, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        self.value, self._good, self.skipped = float(state["value"]), int(state["good"]), int(state["skipped"])
