"""Use of the codebook: statistics of counts, and counts of the newest million codes. Shapes: N code vocabulary."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

ENOUGH_CODES = 1 << 20
"""Codes over which the use of the codebook is counted in training: with fewer, rare codes of a large vocabulary look dead."""
_BLOCKS = 8


def code_statistics(counts_N: Tensor) -> dict[str, float]:
    """Share of codes in use, number of dead ones, perplexity, and the entropy in nats of a code drawn by its frequency."""
    counts_N = counts_N.cpu()  # once, instead of two numbers one after the other
    shares_N = counts_N.double() / counts_N.sum().clamp_min(1)
    entropy = -(shares_N * shares_N.clamp_min(1e-30).log()).sum().item()
    used = int((counts_N > 0).sum())
    return {"code_use": used / len(counts_N), "dead_codes": float(len(counts_N) - used), "perplexity": math.exp(entropy), "entropy_nats": entropy}


class CodeWindow:
    """Counts of the newest codes of this rank: at least ``enough`` once so many have been seen, and at most an eighth more."""

    def __init__(self, vocab: int, device: torch.device, enough: int = ENOUGH_CODES) -> None:
        self._each = -(-enough // _BLOCKS)
        self._closed: deque[Tensor] = deque(maxlen=_BLOCKS)
        self._open_N = torch.zeros(vocab, dtype=torch.int64, device=device)
        self._in_open = 0

    def add(self, codes: Tensor) -> None:
        """Count codes of any shape. No synchronisation with the device."""
        flat = codes.flatten()
        self._open_N.scatter_add_(0, flat, torch.ones_like(flat))
        self._in_open += len(flat)
        if self._in_open >= self._each:
            self._closed.append(self._open_N)
            self._open_N, self._in_open = torch.zeros_like(self._open_N), 0

    def counts(self) -> Tensor:
        """Counts [N], int64."""
        return torch.stack([self._open_N, *self._closed]).sum(0)
