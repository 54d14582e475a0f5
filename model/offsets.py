"""Which image state may attend to which, as rules on raster distances (paper B.1, Figure 11). This is the only definition: dense masks, block masks, the cache used
for drawing, counts and the picture in docs/ all derive from ``is_allowed``. No torch.

S states = T text states, then I = W x W image states in raster order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.config import StreamShape, TransformerConfig

Kind = Literal["row", "column", "conv"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ConvOffsets = Literal["figure", "causal"]


@dataclass(frozen=True)
class MaskRules:
    """The parameters of masks. Each kind of mask uses those that it needs."""

    grid: int
    """Number of image states along each axis, W."""
    conv_kernel: int = 1
    """Side of the convolutional mask, odd."""
    conv_offsets: ConvOffsets = "figure"
    """'figure': the rule fitted to Figure 11(d); 'causal': the plain causal half of the kernel."""

    @classmethod
    def of(cls, cfg: TransformerConfig, shape: StreamShape) -> "MaskRules":
        """The parameters of a model's masks."""
        return cls(shape.grid, cfg.conv_kernel, cfg.conv_offsets)


def _row(distance: Any, rules: MaskRules) -> Any:
    return distance <= rules.grid


def _column(distance: Any, rules: MaskRules) -> Any:
    return distance % rules.grid == 0


def _conv(distance: Any, rules: MaskRules) -> Any:
    grid, half = rules.grid, rules.conv_kernel // 2
    up, left = distance // grid, distance % grid
    if rules.conv_offsets == "figure":
        return (up <= half) & ((left <= half) | (grid - left <= half))
    return ((up <= half) & (left <= half)) | ((up < half) & (grid - left <= half))


@dataclass(frozen=True)
class MaskKind:
    """One kind of mask between image states."""

    allows: Callable[[Any, MaskRules], Any]
    """Whether an image state attends to the state ``distance`` places before it in raster order; only called with distances of at least 0. It uses only operators
    that work on both integers and tensors, so that it can be used inside a compiled kernel, too."""
    is_transposed: bool = False
    """Whether engines arrange image states column by column for this kind (Figure 11c), so that the allowed pairs form dense blocks."""


MASKS: dict[Kind, MaskKind] = {"row": MaskKind(_row), "column": MaskKind(_column, is_transposed=True), "conv": MaskKind(_conv)}
"""The kinds of Figure 11. To add one: a name in ``Kind``, an entry here, and a place in ``layer_kinds`` (docs/architecture.md, "To add X")."""


def mask_kind(kind: Kind) -> MaskKind:
    """Raises: ValueError: an unknown kind."""
    if kind not in MASKS:
        raise ValueError(f"attention kind '{kind}': accepted are {', '.join(KINDS)}")
    return MASKS[kind]


def layer_kinds(layers: int) -> list[Kind]:
    """Mask of each self-attention layer, first to last (paper B.1): row, column, row, row, repeated; the last layer is convolutional.

    All models have this order, and no key of the configuration sets it: if it were changed here, existing runs would continue with other masks unnoticed.
    """
    kinds: list[Kind] = ["column" if (i - 2) % 4 == 0 else "row" for i in range(1, layers)]
    return [*kinds, "conv"]


def is_allowed(kind: Kind, distance: Any, rules: MaskRules) -> Any:
    """Whether an image state attends to the image state ``distance`` places before it in raster order (Figure 11).

    Args:
        kind: which mask.
        distance: query minus key; an int, or a tensor of integers. Below 0, nothing is allowed.

    Returns:
        A bool, or a tensor of them.

    Raises:
        ValueError: an unknown kind.
    """
    return (distance >= 0) & mask_kind(kind).allows(distance, rules)


def allowed_offsets(kind: Kind, rules: MaskRules) -> tuple[int, ...]:
    """Raster distances ``d = query - key >= 0`` at which an image state attends to an image state, ascending; see ``is_allowed``.

    Keys before the first image state are absent: nothing wraps to the end of the image, but offsets do run across the ends of rows.

    Raises:
        ValueError: an unknown kind.
    """
    return tuple(d for d in range(rules.grid**2) if is_allowed(kind, d, rules))


def lines_before(kind: Kind, rules: MaskRules) -> int:
    """How many lines before its own an image state attends to. Lines are rows, or columns if the kind is laid out transposed.

    Raises:
        ValueError: a transposed kind reaches beyond its column; in that layout some keys would come after their query.
    """
    offsets = allowed_offsets(kind, rules)
    if not mask_kind(kind).is_transposed:
        return min(-(-offsets[-1] // rules.grid), rules.grid - 1)
    if any(d % rules.grid for d in offsets):
        raise ValueError(f"attention kind '{kind}' is laid out transposed, so it may allow only multiples of {rules.grid}; it allows {offsets}")
    return 0


def offsets_of(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> tuple[int, ...]:
    """``allowed_offsets`` of a model."""
    return allowed_offsets(kind, MaskRules.of(cfg, shape))


def allowed_pairs(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> int:
    """Number of (query, key) pairs that a layer's mask allows: text with earlier text, image with all text, and image with image by ``offsets_of``."""
    text = shape.text_tokens * (shape.text_tokens + 1) // 2
    return text + shape.image_tokens * shape.text_tokens + sum(shape.image_tokens - d for d in offsets_of(kind, shape, cfg))


def transposed(image: Any, grid: int) -> Any:
    """Position of an image state when the picture is read column by column (Figure 11c). Its own inverse; for integers and tensors."""
    return image % grid * grid + image // grid
