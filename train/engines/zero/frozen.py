"""The weights that a training started from, frozen: this rank's shards of them, in CPU memory.

A whole copy on every GPU would take as much as the model's parameters, and on stage 3 more than there is. Shards take 4 bytes for each parameter, divided by the
sharding ranks, on all stages alike; forward passes with them run on the model itself, whose parameters are made from them and then from the masters again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from train.engines.zero import internals


class FrozenShards:
    """Flat fp32 shards as the masters have them, at first with the same values; ``dalle_init_from`` or a checkpoint fills them. Without masters none are kept."""

    def __init__(self, masters: list[Tensor]) -> None:
        self.values: list[Tensor] = [_on_host(flat) for flat in masters]

    def of(self, flat: int) -> dict[str, Tensor]:
        """The shard beside a flat shard of the masters, by the kind that a checkpoint names it by; empty if none are kept."""
        return {"frozen": self.values[flat]} if self.values else {}

    @contextmanager
    def in_place_of_masters(self, engine: Any, optimizer: Any, stage: int, *, evaluates: bool) -> Iterator[None]:
        """During the block, forward passes of DeepSpeed's ``engine`` use these weights; in evaluation mode, or as training does, to the last bit. Collective. After an error
        nothing is put back, because that would wait for other ranks, which may not have had it."""
        assert self.values, "dalle_fit.objective keeps no frozen weights"
        # On a GPU only until the parameters are made of them, which is between updates: no gradient or activation is there then.
        masters = internals.masters(optimizer, stage)
        internals.refresh_from(optimizer, stage, [value.to(flat.device, non_blocking=True) for value, flat in zip(self.values, masters, strict=True)])
        if evaluates:
            engine.eval()
        yield
        if evaluates:
            engine.train()
        internals.refresh(optimizer, stage)


def _on_host(flat: Tensor) -> Tensor:
    copied = torch.empty(flat.shape, dtype=torch.float32, pin_memory=flat.is_cuda)
    return copied.copy_(flat.detach())
