"""Fragments of flattened tensors: what engines hand to checkpoints, and what checkpoints fill."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of a flattened tensor."""

    tensor: Tensor
    """1-D view of the piece; restoring writes into it."""
    offset: int
    """Index of the piece's first element in the flattened tensor."""
    total: int
    """Number of elements of the whole tensor."""


def even_slice(tensor: Tensor, part: int, parts: int) -> Fragment:
    """Piece ``part`` of ``parts`` of a whole contiguous tensor (the last ones may be shorter, even empty)."""
    flat = tensor.view(-1)
    each = -(-flat.numel() // parts)
    start = min(part * each, flat.numel())
    return Fragment(flat[start : start + each], start, flat.numel())


def full_shape(parameter: Tensor) -> list[int]:
    """Full shape of a parameter, also of one that ZeRO stage 3 has partitioned."""
    return list(getattr(parameter, "ds_shape", parameter.shape))
