"""Floating-point operations of the transformer. No torch. S states, D width, V and N vocabularies."""

from __future__ import annotations

from model.config import StreamShape, TransformerConfig
from model.offsets import allowed_pairs, layer_kinds


def forward_flops(cfg: TransformerConfig, shape: StreamShape) -> float:
    """Of one sample's forward pass: matrix products (two operations each), attention over pairs that its masks allow, each head at its own positions."""
    matrices = cfg.layers * 12 * cfg.width**2 * shape.states
    return 2.0 * (matrices + head_products(cfg, shape) + 2 * cfg.width * layer_pairs(cfg, shape))


def head_products(cfg: TransformerConfig, shape: StreamShape) -> int:
    """Multiplications of one sample's logits: text logits at text positions, image logits at image positions."""
    return cfg.width * (shape.text_tokens * shape.text_vocab + shape.image_tokens * shape.image_vocab)


def layer_pairs(cfg: TransformerConfig, shape: StreamShape) -> int:
    """Pairs of query and key that the masks of all layers allow."""
    kinds = layer_kinds(cfg.layers)
    return sum(kinds.count(kind) * allowed_pairs(kind, shape, cfg) for kind in sorted(set(kinds)))


def train_flops(cfg: TransformerConfig, shape: StreamShape) -> float:
    """Of one sample's forward and backward pass, what cannot be left out: no recomputation, no masked pairs."""
    # The backward pass computes two products for each of the forward pass.
    return 3 * forward_flops(cfg, shape)
