"""Iterate averaging: an exponential moving average of the parameters, beside the optimizer (paper A.2 and B.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Average:
    """fp32 averages of named parameters: a <- decay * a + (1 - decay) * p, at every ``every``-th update.

    Starts at the first parameters it sees. dVAE: decay 0.999 at every update (A.2); transformer: 0.99 at every 25th (B.2).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float, every: int = 1) -> None:
        self.decay, self.every = decay, every
        self._live = dict(parameters)
        self.values: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the parameters after ``updates`` updates, if it is this update's turn."""
        if updates % self.every:
            return
        averages = list(self.values.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in self._live.values()], 1 - self.decay)

    def reset(self) -> None:
        """Start again from the parameters as they are."""
        for name, parameter in self._live.items():
            self.values[name].copy_(parameter.detach())
