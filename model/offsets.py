"""Which state may attend to which, as rules on raster distances (paper B.1, Figure 11). The one definition: dense masks, block masks, the plan of
the cache, counts and the drawing in docs/ all derive from ``is_allowed``. No torch.

S states = T text states, then I = W x W image states in raster order.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from model.config import StreamShape, TransformerConfig

Kind = Literal["row", "column", "conv"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ConvOffsets = Literal["figure", "causal"]


def layer_kinds(layers: int) -> list[Kind]:
    """Mask of each self-attention layer, first to last (paper B.1): row, column, row, row, repeated; the last layer is convolutional."""
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return [*kinds, "conv"]


def is_allowed(kind: Kind, distance: Any, grid: int, conv_kernel: int, conv_offsets: ConvOffsets) -> Any:
    """Whether an image state attends to the image state ``distance`` places before it in raster order (Figure 11).

    Built from operators that integers and tensors share, so that it also serves inside a compiled kernel.

    Args:
        kind: which mask.
        distance: query minus key; an int, or a tensor of integers. Below 0, nothing is allowed.
        grid: image states along each axis, W.
        conv_kernel: side of the convolutional mask, odd.
        conv_offsets: 'figure', the rule fitted to Figure 11(d), or 'causal', the textbook causal half of the kernel.

    Returns:
        A bool, or a tensor of them.

    Raises:
        ValueError: an unknown kind.
    """
    is_past, half = distance >= 0, conv_kernel // 2
    up, left = distance // grid, distance % grid
    if kind == "row":
        return is_past & (distance <= grid)
    if kind == "column":
        return is_past & (left == 0)
    if kind == "conv" and conv_offsets == "figure":
        return is_past & (up <= half) & ((left <= half) | (grid - left <= half))
    if kind == "conv":
        in_row, in_row_above = (up <= half) & (left <= half), (up < half) & (grid - left <= half)
        # Only where the kernel is wider than the grid does its top row reach further than one grid row.
        beyond_top = (distance >= half * grid) & (distance - half * grid <= half)
        return is_past & (in_row | in_row_above | beyond_top)
    raise ValueError(f"attention kind '{kind}': accepted are {', '.join(KINDS)}")


def allowed_offsets(kind: Kind, grid: int, conv_kernel: int, conv_offsets: ConvOffsets) -> tuple[int, ...]:
    """Raster distances ``d = query - key >= 0`` at which an image state attends to an image state, ascending; see ``is_allowed``.

    Keys before the first image state are absent: nothing wraps to the end of the image, but offsets do run across the ends of rows.

    Raises:
        ValueError: an unknown kind.
    """
    return tuple(d for d in range(grid**2) if is_allowed(kind, d, grid, conv_kernel, conv_offsets))


def offsets_of(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> tuple[int, ...]:
    """``allowed_offsets`` of a model."""
    return allowed_offsets(kind, shape.grid, cfg.conv_kernel, cfg.conv_offsets)


def allowed_pairs(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> int:
    """Pairs of query and key that a layer's mask allows: text with earlier text, images with all text, images with images by ``offsets_of``."""
    text = shape.text_tokens * (shape.text_tokens + 1) // 2
    return text + shape.image_tokens * shape.text_tokens + sum(shape.image_tokens - d for d in offsets_of(kind, shape, cfg))


def touched_blocks(kind: Kind, shape: StreamShape, cfg: TransformerConfig, block: int) -> int:
    """Blocks of ``block`` x ``block`` pairs that hold an allowed one: what a block-sparse kernel computes. Columns are laid out column by column."""
    return len(set(_touched(kind, shape, cfg, block)))


def _touched(kind: Kind, shape: StreamShape, cfg: TransformerConfig, block: int) -> Iterator[tuple[int, int]]:
    text, last = shape.text_tokens, (shape.states - 1) // block
    for query in range(text):
        yield from ((query // block, key) for key in range(query // block + 1))
    for query in range(text // block, last + 1):  # some image state, which sees all text
        yield from ((query, key) for key in range((text - 1) // block + 1))
    offsets = offsets_of(kind, shape, cfg)
    for query in range(shape.image_tokens):
        for d in offsets:
            if d <= query:
                places = [text + (transposed(i, shape.grid) if kind == "column" else i) for i in (query, query - d)]
                yield places[0] // block, places[1] // block


def transposed(image: Any, grid: int) -> Any:
    """Place of an image state when the picture is read column by column (Figure 11c); its own inverse, for ints and tensors."""
    return image % grid * grid + image // grid
