"""Sums over machines, several tensors in one message: factors in a wire format, everything else in fp32. The bytes sent are counted here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.engines.zero.compression.fragments import sent_bytes
from train.optimizer.number_formats import SIGNED_169

WIRE_FACTOR = 2.0**-8
"""P and Q are multiplied by this before they are encoded in 1-6-9, which is exact. Then values up to 4092 can be represented, and those from 2^-52 on."""
_CLAMP = SIGNED_169.largest / WIRE_FACTOR


class Exchange:
    """Sums over the ranks with the same local rank, one on each machine."""

    def __init__(self, group: Any, nodes: int, wire: str, device: torch.device) -> None:
        self.group, self.nodes, self.wire, self.device = group, nodes, wire, device
        self.payload = 0
        """Bytes of messages since the counter was last reset."""

    @property
    def sent(self) -> float:
        """Bytes that this rank has sent; the same formula holds for a ring all-reduce and for codes."""
        return sent_bytes(self.payload, self.nodes)

    def sum(self, parts: Sequence[Tensor], *, wire: str | None = None) -> list[Tensor]:
        """The sums of tensors over machines, sent in one message; in fp32, and equal bit for bit on all machines.

        Args:
            wire: the wire format, if it is not that of the factors.
        """
        if not parts:
            return []
        home, wire = parts[0].device, wire or self.wire
        flat = torch.cat([part.reshape(-1).float() for part in parts]).to(self.device)
        if wire == "1-6-9":
            flat = self._sum_of_codes(flat)
        else:
            flat = flat.to(torch.bfloat16) if wire == "bf16" else flat
            self.payload += flat.nbytes
            dist.all_reduce(flat, group=self.group)
            flat = flat.float()
        found = flat.to(home).split([part.numel() for part in parts])
        return [one.view(part.shape) for one, part in zip(found, parts, strict=True)]

    def factors(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """``sum`` of P or Q. Infinities and NaN become the largest value, as in 1-6-9; they are reported by flags and not by values (paper E.2)."""
        return [part.nan_to_num_(_CLAMP, _CLAMP, -_CLAMP) for part in self.sum(parts)]

    def _sum_of_codes(self, flat: Tensor) -> Tensor:
        """Sum codes: each machine receives one part of all codes, sums it in fp32 in the order of ranks, and sends the encoded sum to all. Codes are sent as bytes,
        which every backend supports."""
        each = -(-flat.numel() // self.nodes)
        codes = torch.zeros(each * self.nodes, dtype=torch.int16, device=flat.device)
        codes[: flat.numel()] = SIGNED_169.encode(flat * WIRE_FACTOR)
        self.payload += codes.nbytes
        parts = torch.empty_like(codes)
        dist.all_to_all_single(parts.view(torch.uint8), codes.view(torch.uint8), group=self.group)
        total = torch.zeros(each, device=flat.device)
        for part in parts.view(self.nodes, each):
            total += SIGNED_169.decode(part)
        dist.all_gather_into_tensor(codes.view(torch.uint8), SIGNED_169.encode(total).view(torch.uint8), group=self.group)
        return SIGNED_169.decode(codes)[: flat.numel()] / WIRE_FACTOR
