"""Shards summed over machines without compression, and what any such exchange takes: bytes and seconds, for the metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.engines.zero.compression.fragments import sent_bytes


def sum_exactly(tensors: Sequence[Tensor], is_block_matrix: Sequence[bool], *, half: bool, device: torch.device, group: Any) -> int:
    """Sum shards over the nodes in place, block matrices in fp16 if they are stored or sent in fp16 (``half``), everything else in fp32. Returns the payload's bytes.

    Args:
        device: where messages are sent from; offloaded gradients are on the CPU.
    """
    payload = 0
    for matrices in (True, False):
        chosen = [tensor for tensor, matrix in zip(tensors, is_block_matrix, strict=True) if matrix == matrices]
        if not chosen:
            continue
        wire = torch.cat([t.to(torch.float16) if half and matrices else t.float() for t in chosen]).to(device)
        payload += wire.nbytes
        dist.all_reduce(wire, group=group)
        for tensor, part in zip(chosen, wire.split([t.numel() for t in chosen]), strict=True):
            tensor.copy_(part)
    return payload


class Exchanged:
    """Bytes and seconds of this rank's last exchange with other machines. On a GPU events mark its ends: the host waits for nothing, and the time is known when it
    has waited for the step's message."""

    def __init__(self, nodes: int, device: torch.device) -> None:
        self._nodes, self._events = nodes, [torch.cuda.Event(enable_timing=True) for _ in range(2 if device.type == "cuda" else 0)]
        self._at = self._seconds = 0.0
        self._bytes = 0.0

    def begin(self) -> None:
        """An exchange begins."""
        self._at = time.perf_counter()
        if self._events:
            self._events[0].record()

    def end(self, payload: int) -> None:
        """It has ended, or on a GPU was asked for.

        Args:
            payload: bytes that were summed over machines.
        """
        self._bytes, self._seconds = sent_bytes(payload, self._nodes), time.perf_counter() - self._at
        if self._events:
            self._events[1].record()

    def numerics(self) -> dict[str, float]:
        """For the metrics. To be called after the host has waited for the step's message."""
        seconds = self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._seconds
        return {"between_machines_bytes": self._bytes, "between_machines_s": seconds}
