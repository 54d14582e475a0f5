"""Masks as tensors, derived from the rules in model/offsets.py (paper B.1, Figure 11)."""

import torch
from torch import Tensor

from model.config import StreamShape, TransformerConfig
from model.offsets import KINDS, Kind, MaskRules, allowed_offsets, is_allowed, layer_kinds

__all__ = ["KINDS", "Kind", "allowed_offsets", "dense_mask", "layer_kinds"]


def dense_mask(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> Tensor:
    """The whole mask, bool [S, S]: true where a query (row) may attend to a key (column).

    Text attends causally to text and not to the image; every image state attends to all text states (including padding), and to image states by ``is_allowed``
    (docs/paper.md 3.3, Figure 11).

    Raises:
        ValueError: the kind is unknown.
    """
    image_I = torch.arange(shape.image_tokens)
    distance_II = image_I[:, None] - image_I[None, :]
    mask_SS = torch.zeros(shape.states, shape.states, dtype=torch.bool)
    mask_SS[: shape.text_tokens, : shape.text_tokens] = torch.ones(shape.text_tokens, shape.text_tokens).tril().bool()
    mask_SS[shape.text_tokens :, : shape.text_tokens] = True
    mask_SS[shape.text_tokens :, shape.text_tokens :] = is_allowed(kind, distance_II, MaskRules.of(cfg, shape))
    return mask_SS
