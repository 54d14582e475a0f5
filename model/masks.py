"""Which state may attend to which: one definition by offset rules (paper B.1, Figure 11), from which every engine's mask derives.

S states = T text states, then I = W x W image states in raster order.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from model.config import StreamShape, TransformerConfig

Kind = Literal["row", "column", "conv"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def layer_kinds(layers: int) -> list[Kind]:
    """Mask of each self-attention layer, first to last (paper B.1): row, column, row, row, repeated; the last layer is convolutional."""
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return [*kinds, "conv"]


def allowed_offsets(kind: Kind, grid: int, conv_kernel: int, conv_offsets: Literal["figure", "causal"]) -> tuple[int, ...]:
    """Raster distances ``d = query - key >= 0`` at which an image state attends to an image state (Figure 11), ascending.

    Keys before the first image state are absent: nothing wraps to the end of the image, but offsets do run across the ends of rows.

    Args:
        kind: which mask.
        grid: image states along each axis, W.
        conv_kernel: side of the convolutional mask, odd.
        conv_offsets: 'figure', the rule fitted to Figure 11(d), or 'causal', the textbook causal half of the kernel.

    Raises:
        ValueError: an unknown kind.
    """
    distances = range(grid**2)
    half = conv_kernel // 2
    if kind == "row":
        return tuple(d for d in distances if d <= grid)
    if kind == "column":
        return tuple(d for d in distances if d % grid == 0)
    if kind == "conv" and conv_offsets == "figure":
        return tuple(d for d in distances if d // grid <= half and min(d % grid, grid - d % grid) <= half)
    if kind == "conv":
        kernel = {up * grid + left for up in range(half + 1) for left in range(-half, half + 1)}
        return tuple(d for d in distances if d in kernel)
    raise ValueError(f"attention kind '{kind}': accepted are {', '.join(KINDS)}")


def dense_mask(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> Tensor:
    """The whole mask, bool [S, S], true where query (row) may see key (column).

    Text is causal, text sees no image, every image state sees every text state (padding included), image sees image by
    ``allowed_offsets`` (paper 3.3, Figure 11).

    Raises:
        ValueError: an unknown kind.
    """
    offsets = allowed_offsets(kind, shape.grid, cfg.conv_kernel, cfg.conv_offsets)
    is_allowed_I = torch.zeros(shape.image_tokens, dtype=torch.bool)
    is_allowed_I[list(offsets)] = True
    image_I = torch.arange(shape.image_tokens)
    distance_II = image_I[:, None] - image_I[None, :]
    mask_SS = torch.zeros(shape.states, shape.states, dtype=torch.bool)
    mask_SS[: shape.text_tokens, : shape.text_tokens] = torch.ones(shape.text_tokens, shape.text_tokens).tril().bool()
    mask_SS[shape.text_tokens :, : shape.text_tokens] = True
    mask_SS[shape.text_tokens :, shape.text_tokens :] = is_allowed_I[distance_II.clamp(min=0)] & (distance_II >= 0)
    return mask_SS
