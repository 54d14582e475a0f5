"""Attention engines. An engine computes ``attend(q_BHSK, k_BHSK, v_BHSK, kind) -> out_BHSK`` for the mask that ``kind`` names.

B batch, H heads, S states (T text, then I image), K width of a head.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import StreamShape, TransformerConfig
from model.masks import Kind, dense_mask, layer_kinds


class Attend(Protocol):
    """What a resblock asks of an engine."""

    def __call__(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        """Softmax attention under the mask of ``kind``; scores are scaled by 1/sqrt(K)."""
        ...


class DenseAttention(nn.Module):
    """The reference engine: scaled_dot_product_attention under the whole [S, S] mask. Runs anywhere."""

    def __init__(self, cfg: TransformerConfig, shape: StreamShape) -> None:
        super().__init__()
        for kind in sorted(set(layer_kinds(cfg.layers))):
            self.register_buffer(f"mask_{kind}", dense_mask(kind, shape, cfg), persistent=False)

    def forward(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=getattr(self, f"mask_{kind}"))
