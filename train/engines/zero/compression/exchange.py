"""Sums over machines as one message: factors in a wire format, the rest in fp32. What was sent is counted where the collectives are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.engines.zero.compression.fragments import sent_bytes
from train.optimizer.number_formats import SIGNED_169

WIRE_FACTOR = 2.0**-8
"""P and Q are multiplied by it on the wire in 1-6-9, exactly: values up to 4092 fit, and still those from 2^-52 on. One constant serves both."""
_CLAMP = SIGNED_169.largest / WIRE_FACTOR


class Exchange:
    """Sums over the ranks of equal ordinal, one of each machine."""

    def __init__(self, group: Any, nodes: int, wire: str, device: torch.device) -> None:
        self.group, self.nodes, self.wire, self.device = group, nodes, wire, device
        self.payload = 0
        """Bytes of the messages since the counter was last set to zero."""

    @property
    def sent(self) -> float:
        """Bytes that this rank has sent, by a ring or by codes alike."""
        return sent_bytes(self.payload, self.nodes)

    def sum(self, parts: Sequence[Tensor], *, wire: str | None = None) -> list[Tensor]:
        """The sums of tensors over machines, in fp32 and bit-equal on all of them, as one message.

        Args:
            wire: another format than that of the factors.
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
        """``sum`` of P or Q; infinities and NaN become the largest value, as in 1-6-9: flags tell of them, not values (paper E.2)."""
        return [part.nan_to_num_(_CLAMP, _CLAMP, -_CLAMP) for part in self.sum(parts)]

    def _sum_of_codes(self, flat: Tensor) -> Tensor:
        """Every machine gets one part of all codes, sums it in fp32 in the order of ranks, and sends the sum's codes to all. Codes travel as bytes, which every
        backend takes."""
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
