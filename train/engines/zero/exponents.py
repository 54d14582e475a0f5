"""How large gradients are: for each resblock, how many of its reduced gradients have which exponent of two (paper D.3: what a constant before reduction is chosen by)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from train.engines.zero.shards import Gradients

LOWEST, HIGHEST = -48, 16
"""Exponents that have a bin of their own; values beyond are counted with the last ones. fp16 holds -24 to 15."""
BINS = HIGHEST - LOWEST + 1
_NOWHERE = LOWEST - 9.0
_PIECE = 1 << 22
"""Elements that are looked at together: the memory that this takes, and so few that fp32 counts them exactly."""


class Exponents:
    """Counts on the device, and reads what came of it once the host has waited for the step's message: nothing waits for it."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots, self._device = slots, device
        self._asked: Tensor | None = None

    @torch.no_grad()
    def ask(self, found: Gradients) -> None:
        """Count this rank's gradients and sum the counts over all ranks. Collective. Zeros, and values that are not finite, have no exponent and are left out."""
        table_PE = torch.stack([_counted(t) for t in found.tensors]) if found.tensors else None
        counts_SE = torch.zeros(self._slots, BINS, dtype=torch.float64, device=self._device)
        if table_PE is not None:
            counts_SE = found.layout.table_by_slot(table_PE).to(self._device, non_blocking=True)
        if dist.is_initialized():
            dist.all_reduce(counts_SE)
        self._asked = torch.empty(counts_SE.shape, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        self._asked.copy_(counts_SE, non_blocking=True)

    def read(self, replicas: int) -> list[list[float]]:
        """The counts of each slot, if they were asked for in this update; to be called after the step's message. Each shard was counted ``replicas`` times."""
        asked, self._asked = self._asked, None
        return [] if asked is None else [[count / replicas for count in row] for row in asked.tolist()]


def _counted(t: Tensor) -> Tensor:
    """float64 [BINS]: how many values have each exponent e, that is 2**e <= |value| < 2**(e+1)."""
    total = torch.zeros(BINS, dtype=torch.float64, device=t.device)
    for piece in t.split(_PIECE):
        values = piece.float()
        exponents = torch.frexp(values).exponent.float().sub_(1).clamp_(LOWEST, HIGHEST)
        exponents = torch.where((values != 0) & values.isfinite(), exponents, _NOWHERE)
        total += torch.histc(exponents, BINS, LOWEST - 0.5, HIGHEST + 0.5).double()
    return total
