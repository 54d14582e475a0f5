"""Gradients of fp16 weights over the micro-batches of an update, added up in fp32 (stage 1, whose gradients stay whole until the last one).

ZeRO takes its dtype from the first parameter, which is fp32, and so keeps no separate sums: those of fp16 parameters would add up in fp16, where a micro-batch
less than 2^-11 of the sum so far is lost.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class HalfGradients:
    """Sums beside the parameters. Its hooks must be registered before ZeRO's own, which reduce what they find when the last micro-batch's gradient is there."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.is_last = True
        """Whether the micro-batch under way ends its update."""
        self._sums: dict[Tensor, Tensor] = {}
        for p in parameters:
            p.register_post_accumulate_grad_hook(self._take)

    @torch.no_grad()
    def _take(self, p: Tensor) -> None:
        assert p.grad is not None  # the hook is called when it is
        so_far = self._sums.get(p)
        if self.is_last:
            if so_far is not None:
                p.grad.copy_(self._sums.pop(p).add_(p.grad))  # rounded once, to what travels
            return
        if so_far is None:
            self._sums[p] = p.grad.float()
        else:
            so_far.add_(p.grad)
        p.grad = None
