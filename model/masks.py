"""Masks as tensors, and what of the past a cache must visit; all from the rules in model/offsets.py (paper B.1, Figure 11)."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import StreamShape, TransformerConfig
from model.offsets import KINDS, Kind, allowed_offsets, is_allowed, layer_kinds, offsets_of

__all__ = ["KINDS", "CachePlan", "Kind", "allowed_offsets", "cache_plan", "dense_mask", "layer_kinds"]


def dense_mask(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> Tensor:
    """The whole mask, bool [S, S], true where query (row) may see key (column).

    Text is causal, text sees no image, every image state sees every text state (padding included), image sees image by
    ``is_allowed`` (paper 3.3, Figure 11).

    Raises:
        ValueError: an unknown kind.
    """
    image_I = torch.arange(shape.image_tokens)
    distance_II = image_I[:, None] - image_I[None, :]
    mask_SS = torch.zeros(shape.states, shape.states, dtype=torch.bool)
    mask_SS[: shape.text_tokens, : shape.text_tokens] = torch.ones(shape.text_tokens, shape.text_tokens).tril().bool()
    mask_SS[shape.text_tokens :, : shape.text_tokens] = True
    mask_SS[shape.text_tokens :, shape.text_tokens :] = is_allowed(kind, distance_II, shape.grid, cfg.conv_kernel, cfg.conv_offsets)
    return mask_SS


@dataclass(frozen=True)
class CachePlan:
    """What of the cached image states a new image state visits: every ``step``-th from ``furthest`` places back to itself, less the holes.

    A slice of the cache, so that nothing is gathered: a row has a contiguous window, a column a strided one, a convolution a window with holes.
    """

    furthest: int
    step: int
    is_allowed_V: Tensor | None
    """bool, for each visited state, the furthest first; None where there are no holes."""

    def visit(self, position: int) -> tuple[slice, Tensor | None]:
        """Cached image states of the image state at ``position`` (itself included), and which of them are allowed."""
        first = position % self.step if self.furthest > position else position - self.furthest
        count = (position - first) // self.step + 1
        return slice(first, position + 1, self.step), None if self.is_allowed_V is None else self.is_allowed_V[-count:]


def cache_plan(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> CachePlan:
    """See CachePlan.

    Raises:
        ValueError: an unknown kind.
    """
    offsets = offsets_of(kind, shape, cfg)
    furthest = offsets[-1]
    step = min((b - a for a, b in itertools.pairwise(offsets)), default=1)
    if any(d % step for d in offsets):
        step = 1
    visited = range(furthest, -1, -step)
    is_allowed_V = torch.tensor([d in set(offsets) for d in visited])
    return CachePlan(furthest, step, None if bool(is_allowed_V.all()) else is_allowed_V)
