"""What a rank's time in an update went to, and how much of it was its own work, in which it waits for no other rank."""

from __future__ import annotations

import time
from typing import Any

import torch

NAMES = ("data", "forward", "backward", "reduce", "step", "save")
"""Parts of an update in the order in which they come: 'reduce' is the wait for the step's message, 'save' that for copies of a checkpoint."""


class Phases:
    """Marks the ends of an update's parts. On a GPU forward passes are timed by events, which are read an update later: by then the host has waited for the
    step's message anyway, and nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._events: list[tuple[Any, Any]] = []
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self._at = 0.0
        self.parts: list[tuple[str, float, float]] = []
        """Of the update under way, or the last one: name, begin and end of each part, by this process's clock."""

    def begin(self, at: float) -> None:
        """An update begins."""
        self._seconds = dict.fromkeys(NAMES, 0.0)
        self.parts, self._at = [], at

    def resume(self) -> None:
        """What went on since the last part belongs to none."""
        self._at = time.perf_counter()

    def ended(self, name: str) -> float:
        """A part has ended; the next one begins. Returns its seconds."""
        now = time.perf_counter()
        begun, self._at = self._at, now
        self._seconds[name] += now - begun
        self.parts.append((name, begun, now))
        return now - begun

    def forward(self) -> None:
        """A forward pass begins."""
        if self._gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)

    def forward_ended(self) -> None:
        """It was asked for; a GPU may still be at it."""
        if self._gpu:
            self._events[-1][1].record()
        self.ended("forward")

    def own_s(self) -> float:
        """Seconds of own work of the last whole update: fetching and forward passes. In backward passes, messages and steps ranks wait for each other, and take
        equally long. To be called between two updates."""
        if not self._gpu:
            return self._seconds["data"] + self._seconds["forward"]
        pairs, self._events = self._events, []
        return self._seconds["data"] + sum(begun.elapsed_time(ended) for begun, ended in pairs) / 1000
