"""FlexAttention with block masks: the engine for GPUs. Written for torch 2.11 to 2.15; not yet run on a GPU, but its kernels were interpreted (docs/kernels.md).

B batch, H heads, S states (T text, then I image), K width of a head.
"""

from collections.abc import Callable
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model.config import StreamShape, TransformerConfig
from model.offsets import Kind, MaskRules, is_allowed, layer_kinds, mask_kind, transposed

BLOCK = 128
"""Number of queries and of keys in a block. At 256 + 1024 states a row layer needs 0.62 of the causal blocks of 128, and 0.50 of those of 64."""

_NUMBERS = count()

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def mask_mod(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> MaskMod:
    """The mask as FlexAttention needs it: (batch, head, query, key) -> bool, in the layout of its kind (``MaskKind.is_transposed``)."""
    text, grid, rules, is_transposed = shape.text_tokens, shape.grid, MaskRules.of(cfg, shape), mask_kind(kind).is_transposed

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q_image, k_image = query - text, key - text
        if is_transposed:
            q_image, k_image = transposed(q_image, grid), transposed(k_image, grid)
        sees_image = (query >= text) & (key >= text) & is_allowed(kind, q_image - k_image, rules)
        return cast(Tensor, sees_image | ((key < text) & (query >= key)))

    return allowed


def block_mask(kind: Kind, shape: StreamShape, cfg: TransformerConfig, device: torch.device | str, block: int = BLOCK) -> BlockMask:
    """Which blocks a kernel visits, and which of these are only partly allowed, so that it must mask inside them."""
    states = shape.states
    return create_block_mask(mask_mod(kind, shape, cfg), None, None, states, states, device=str(device), BLOCK_SIZE=block)


def _compiled(kernel: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """The kernel, compiled for one kind of layer. torch counts compilations by code object and refuses the ninth: three kinds, times training and evaluation, times
    batch sizes, are more. So each gets a code object of its own, with a name of its own, because torch compares them by value."""

    def attend(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, block_mask: BlockMask) -> Any:
        return kernel(q_BHSK, k_BHSK, v_BHSK, block_mask=block_mask)

    attend.__code__ = attend.__code__.replace(co_name=f"attend_{kind}_{next(_NUMBERS)}")
    # fullgraph: otherwise torch would silently run uncompiled after too many recompilations.
    return torch.compile(attend, fullgraph=True)


class FlexAttention(nn.Module):
    """Compiled FlexAttention, whose scores are never written to global memory.

    For kinds of mask that are laid out transposed, image states are transposed, so that their blocks are dense. On a CPU there is no backward pass.
    """

    def __init__(
        self, cfg: TransformerConfig, shape: StreamShape, *, block: int = BLOCK, compiled: bool = True, kernel: Callable[..., Any] = flex_attention
    ) -> None:
        """
        Args:
            compiled: False runs FlexAttention's own unfused reference, which writes all scores to memory; for tests on a CPU.
            kernel: called instead of ``flex_attention``, which needs the driver of a GPU; for tests without one.
        """
        super().__init__()
        self.cfg, self.shape, self.block = cfg, shape, block
        self._kernel, self._is_compiled = kernel, compiled
        self._flex: dict[Kind, Callable[..., Any]] = {}
        self._masks: dict[tuple[Kind, torch.device], BlockMask] = {}
        self.order_S: Tensor
        image_I = torch.arange(shape.image_tokens)
        order_S = torch.cat([torch.arange(shape.text_tokens), shape.text_tokens + transposed(image_I, shape.grid)])
        self.register_buffer("order_S", order_S, persistent=False)
        self.kinds = sorted(set(layer_kinds(cfg.layers)))

    def forward(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        place = (kind, q_BHSK.device)
        if place not in self._masks:
            self._masks[place] = block_mask(kind, self.shape, self.cfg, q_BHSK.device, self.block)
        if kind not in self._flex:
            self._flex[kind] = _compiled(self._kernel, kind) if self._is_compiled else self._kernel
        attend = self._flex[kind]
        if not mask_kind(kind).is_transposed:
            return cast(Tensor, attend(q_BHSK, k_BHSK, v_BHSK, block_mask=self._masks[place]))
        q_BHSK, k_BHSK, v_BHSK = (t.index_select(2, self.order_S) for t in (q_BHSK, k_BHSK, v_BHSK))
        # The order is its own inverse: it exchanges rows and columns of the grid.
        return cast(Tensor, attend(q_BHSK, k_BHSK, v_BHSK, block_mask=self._masks[place])).index_select(2, self.order_S)
