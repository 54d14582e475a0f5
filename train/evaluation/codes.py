"""How the codebook is used: counts of the most recent million codes, and statistics of counts. Shapes: N code vocabulary."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

ENOUGH_CODES = 1 << 20
"""During training, the use of the codebook is counted over this many codes. With fewer, rare codes of a large vocabulary would look unused."""
_BLOCKS = 8


def code_statistics(counts_N: Tensor) -> dict[str, float]:
    """Fraction of the codes that are used, number of codes that are not, perplexity, and entropy in nats of the distribution of codes."""
    counts_N = counts_N.cpu()  # one transfer, instead of one for each number below
    shares_N = counts_N.double() / counts_N.sum().clamp_min(1)
    entropy = -(shares_N * shares_N.clamp_min(1e-30).log()).sum().item()
    used = int((counts_N > 0).sum())
    return {"code_use": used / len(counts_N), "dead_codes": float(len(counts_N) - used), "perplexity": math.exp(entropy), "entropy_nats": entropy}


class CodeWindow:
    """Counts this rank's most recent codes: at least ``enough``, once there have been so many, and at most an eighth more."""

    def __init__(self, vocab: int, device: torch.device, enough: int = ENOUGH_CODES) -> None:
        self._each = -(-enough // _BLOCKS)
        self._closed: deque[Tensor] = deque(maxlen=_BLOCKS)
        self._open_N = torch.zeros(vocab, dtype=torch.int64, device=device)
        self._in_open = 0

    def add(self, codes: Tensor) -> None:
        """Count the codes in a tensor of any shape. Does not wait for the device."""
        flat = codes.flatten()
        self._open_N.scatter_add_(0, flat, torch.ones_like(flat))
        self._in_open += len(flat)
        if self._in_open >= self._each:
            self._closed.append(self._open_N)
            self._open_N, self._in_open = torch.zeros_like(self._open_N), 0

    def counts(self) -> Tensor:
        """Counts [N], int64."""
        return torch.stack([self._open_N, *self._closed]).sum(0)
