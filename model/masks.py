"""Masks as tensors, from the rules in model/offsets.py (paper B.1, Figure 11)."""

import torch
from torch import Tensor

from model.config import StreamShape, TransformerConfig
from model.offsets import KINDS, Kind, MaskRules, allowed_offsets, is_allowed, layer_kinds

__all__ = ["KINDS", "Kind", "allowed_offsets", "dense_mask", "layer_kinds"]


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
    mask_SS[shape.text_tokens :, shape.text_tokens :] = is_allowed(kind, distance_II, MaskRules.of(cfg, shape))
    return mask_SS
