"""The cache of keys and values of a layer while a picture is drawn. It holds no more than the layer's mask can still see.

B pictures, H heads, K width of a head, Q states at once, R places of a ring, G = W = grid, P past states.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import StreamShape, TransformerConfig
from model.offsets import Kind, mask_kind, offsets_of


@dataclass(frozen=True)
class Window:
    """The image states that are computed in one pass: Q consecutive ones in each picture."""

    first_B: Tensor
    """The first state of the window in each picture, int64."""
    length: int
    common: int | None = None
    """The first state, if it is the same in all pictures."""

    @property
    def states_BQ(self) -> Tensor:
        return self.first_B[:, None] + torch.arange(self.length, device=self.first_B.device)


class PastCache:
    """Keys and values of a layer's past image states.

    For a kind of mask in raster order (row, convolution) it is a ring buffer with as many places as the largest offset of the mask; states in between that the
    mask excludes are stored, too, and masked. For a transposed kind (column) it holds all states, column by column, so that the states that one state attends
    to are adjacent. States of the present pass are added only once their inputs are known to be right (``keep``), so that nothing has to be removed again.
    """

    def __init__(self, kind: Kind, shape: StreamShape, cfg: TransformerConfig, pictures: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kind, self.grid = kind, shape.grid
        offsets = offsets_of(kind, shape, cfg)
        self.places = cache_places(kind, shape, cfg)
        width = cfg.width // cfg.heads
        self.keys_BHRK = torch.zeros(pictures, cfg.heads, self.places, width, dtype=dtype, device=device)
        self.values_BHRK = torch.zeros_like(self.keys_BHRK)
        # Built on the CPU: on a GPU, the indexing would make the host wait for all work that is queued there.
        allowed_I = torch.zeros(shape.image_tokens, dtype=torch.bool)
        allowed_I[list(offsets)] = True
        self.is_allowed_I = allowed_I.to(device, non_blocking=True)
        """Whether the mask allows each raster distance."""
        back_RR = 1 + (torch.arange(self.places)[:, None] - 1 - torch.arange(self.places)) % max(1, self.places)
        ring_RR = allowed_I[back_RR.clamp(max=shape.image_tokens - 1)]
        self.ring_RR = None if mask_kind(kind).is_transposed or bool(ring_RR.all()) else ring_RR.to(device, non_blocking=True)
        """Whether a state at place r of the ring attends to each place of a full ring; None if it attends to all."""

    def place(self, states: Tensor) -> Tensor:
        """The places of image states in the cache."""
        return states % self.grid * self.grid + states // self.grid if mask_kind(self.kind).is_transposed else states % max(1, self.places)

    def one_state(self, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [B, H, P, K] for the state ``first`` of every picture, and a mask of those that it attends to (None: all). They are views, not copies."""
        if mask_kind(self.kind).is_transposed:
            begin = first % self.grid * self.grid
            span, is_seen_P = slice(begin, begin + first // self.grid), None
        else:
            span = slice(0, min(first, self.places))
            is_seen_P = None if self.ring_RR is None else self.ring_RR[first % self.places, span]
        return self.keys_BHRK[:, :, span], self.values_BHRK[:, :, span], is_seen_P

    def visible(self, window: Window) -> Tensor:
        """bool [B, Q, P]: to which places (in a column layer: places of its column) each state of the window attends."""
        states_BQ = window.states_BQ
        if mask_kind(self.kind).is_transposed:
            row_W = torch.arange(self.grid, device=states_BQ.device)
            held_BQP = row_W * self.grid + states_BQ[..., None] % self.grid
            return held_BQP < window.first_B[:, None, None]
        newest_B1 = window.first_B[:, None] - 1
        held_BR = newest_B1 - (newest_B1 - torch.arange(self.places, device=states_BQ.device)) % max(1, self.places)
        back_BQR = states_BQ[..., None] - held_BR[:, None]
        return (held_BR >= 0)[:, None] & self.is_allowed_I[back_BQR.clamp(0, len(self.is_allowed_I) - 1)] & (back_BQR < len(self.is_allowed_I))

    def columns(self, kept_BHRK: Tensor, window: Window) -> Tensor:
        """For a column layer: the cached values in the column of each state of the window, [B, H, Q, W, K]."""
        pictures, heads, _, width = kept_BHRK.shape
        by_column = kept_BHRK.view(pictures, heads, self.grid, self.grid, width)
        index_BQ = window.states_BQ % self.grid
        return by_column.gather(2, index_BQ[:, None, :, None, None].expand(-1, heads, -1, self.grid, width))

    def keep_one(self, first: int, k_BH1K: Tensor, v_BH1K: Tensor) -> None:
        """Store the state ``first`` of every picture."""
        if self.places:
            at = first % self.grid * self.grid + first // self.grid if mask_kind(self.kind).is_transposed else first % self.places
            self.keys_BHRK[:, :, at] = k_BH1K[:, :, 0]
            self.values_BHRK[:, :, at] = v_BH1K[:, :, 0]

    def keep(self, window: Window, counts_B: Tensor, k_BHQK: Tensor, v_BHQK: Tensor) -> None:
        """Store the first ``counts_B`` states of a window; of states that share a place of the ring, the last."""
        if not self.places:
            return
        # The number of stored states must not depend on counts_B, or the host would have to wait for its value. So instead of leaving states out, one that is
        # stored anyway is written again; if there is none, what was there before. A finished picture stores states that are never read.
        last_B1 = (counts_B[:, None] - 1).clamp(min=0)
        step_BQ = torch.arange(window.length, device=counts_B.device).maximum(last_B1 - self.places + 1).minimum(last_B1)
        at_BQ = self.place(window.first_B[:, None] + step_BQ).clamp(max=self.places - 1)
        picture_B1 = torch.arange(len(at_BQ), device=at_BQ.device)[:, None]
        for kept_BHRK, new_BHQK in ((self.keys_BHRK, k_BHQK), (self.values_BHRK, v_BHQK)):
            is_any_B111 = (counts_B > 0)[:, None, None, None]
            kept_BHRK[picture_B1, :, at_BQ] = torch.where(is_any_B111, new_BHQK[picture_B1, :, step_BQ], kept_BHRK[picture_B1, :, at_BQ])


def cache_places(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> int:
    """How many past image states a layer caches for a picture, besides the states of the present pass."""
    return shape.image_tokens if mask_kind(kind).is_transposed else offsets_of(kind, shape, cfg)[-1]
