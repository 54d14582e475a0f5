"""Floating-point operations of the transformer. Needs no torch. S states, D width, V and N vocabularies."""

from __future__ import annotations

from model.config import StreamShape, TransformerConfig
from model.offsets import MaskRules, allowed_pairs, layer_kinds, lines_before


def forward_flops(cfg: TransformerConfig, shape: StreamShape) -> float:
    """Operations of one sample's forward pass: matrix products (two operations for each multiplication), attention only over the pairs that masks allow, and each head
    only at its own positions."""
    matrices = cfg.layers * 12 * cfg.width**2 * shape.states
    return 2.0 * (matrices + head_products(cfg, shape) + 2 * cfg.width * layer_pairs(cfg, shape))


def head_products(cfg: TransformerConfig, shape: StreamShape) -> int:
    """Number of multiplications for one sample's logits: text logits at text positions, image logits at image positions."""
    return cfg.width * (shape.text_tokens * shape.text_vocab + shape.image_tokens * shape.image_vocab)


def layer_pairs(cfg: TransformerConfig, shape: StreamShape) -> int:
    """Number of pairs of query and key that masks allow, summed over all layers."""
    kinds = layer_kinds(cfg.layers)
    return sum(kinds.count(kind) * allowed_pairs(kind, shape, cfg) for kind in sorted(set(kinds)))


def visited_pairs(cfg: TransformerConfig, shape: StreamShape, engine: str) -> int:
    """Number of pairs of query and key that an attention engine computes, summed over all layers: of FlexAttention those that masks allow (blocks on their edges add to
    that), of the others whole lines or the whole square."""
    if engine == "dense":
        return cfg.layers * shape.states**2
    if engine == "flex":
        return layer_pairs(cfg, shape)
    text, image, rules = shape.text_tokens, shape.image_tokens, MaskRules.of(cfg, shape)
    return sum(text**2 + image * (text + (lines_before(kind, rules) + 1) * shape.grid) for kind in layer_kinds(cfg.layers))


def visited_flops(cfg: TransformerConfig, shape: StreamShape, engine: str) -> float:
    """``forward_flops`` with the pairs that an attention engine computes."""
    return forward_flops(cfg, shape) + 4.0 * cfg.width * (visited_pairs(cfg, shape, engine) - layer_pairs(cfg, shape))


def train_flops(cfg: TransformerConfig, shape: StreamShape) -> float:
    """Operations of one sample's forward and backward pass that are necessary: without recomputation and masked pairs."""
    # The backward pass computes two products for each product of the forward pass.
    return 3 * forward_flops(cfg, shape)


def update_flops(cfg: TransformerConfig, shape: StreamShape, *, contrasts: bool) -> float:
    """Operations that are necessary for one sample of an update: ``train_flops``; where captions are contrasted (train/stages/dalle_contrast.py), those under both captions,
    and forward passes of the frozen weights under both."""
    once = train_flops(cfg, shape)
    return 2 * once + 2 * forward_flops(cfg, shape) if contrasts else once
