"""Random numbers to start from. A tensor on the device "meta" has none: torch would import parts of its compiler to say so (1.3 s of a core, which whoever opens
exported weights is spared)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal_(weight: Tensor, std: float) -> None:
    """Fill a new weight with normal numbers around 0."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def normal(*shape: int, times: float = 1.0, over: float = 1.0) -> Tensor:
    """A new tensor of normal numbers around 0: those of ``torch.randn``, multiplied and divided."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_().mul_(times).div_(over)
