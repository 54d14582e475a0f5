"""Attention engines that run anywhere. An engine computes ``attend(q_BHSK, k_BHSK, v_BHSK, kind) -> out_BHSK`` for the mask that ``kind`` names.

``model/attention_engines.py`` makes one by name; FlexAttention is in ``model/flex.py``.

B batch, H heads, S states (T text, then I image as Y rows of X columns), K width of a head, L places along one axis (a row or a column),
W keys in the window of such a line.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import sdpa
from model.config import StreamShape, TransformerConfig
from model.masks import Kind, dense_mask, layer_kinds
from model.offsets import MaskRules, lines_before, mask_kind


class Attend(Protocol):
    """An attention engine, as a resblock calls it. Every engine computes the same, up to rounding."""

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
        return sdpa.attention(q_BHSK, k_BHSK, v_BHSK, mask=getattr(self, f"mask_{kind}"), fused=True)


class StructuredAttention(nn.Module):
    """The engine for CPUs: each line of the image (a row, or for a column mask a column) attends to the text and to a few lines only.

    The queries of a line see the keys of the line itself and of those lines before it that the mask reaches, so the scores have shape [L, X, T + W] instead of
    [S, S]. Equal to DenseAttention up to rounding; its masks are parts of the dense masks.
    """

    def __init__(self, cfg: TransformerConfig, shape: StreamShape) -> None:
        super().__init__()
        self.text_tokens, self.grid = shape.text_tokens, shape.grid
        self.lines_before: dict[str, int] = {}
        # The softmax is explicit: at these sizes it is several times as fast as the CPU's flash kernel, whose blocks are larger than a line.
        self.bias_text: Tensor
        self.register_buffer("bias_text", torch.full((shape.text_tokens, shape.text_tokens), float("-inf")).triu(1), persistent=False)
        for kind in sorted(set(layer_kinds(cfg.layers))):
            before = lines_before(kind, MaskRules.of(cfg, shape))
            mask_YXYX = (
                dense_mask(kind, shape, cfg)[shape.text_tokens :, shape.text_tokens :].unflatten(1, (shape.grid, -1)).unflatten(0, (shape.grid, -1))
            )
            if mask_kind(kind).is_transposed:
                mask_YXYX = mask_YXYX.permute(1, 0, 3, 2)
            # Windows of keys as in _windows; those of the first lines begin before the image, hence the padding.
            padded = F.pad(mask_YXYX, (0, 0, before, 0))
            window_LXW = torch.stack([padded[line, :, line : line + before + 1].flatten(1) for line in range(shape.grid)])
            self.lines_before[kind] = before
            self.register_buffer(f"bias_{kind}", torch.zeros(window_LXW.shape).masked_fill(~window_LXW, float("-inf")), persistent=False)

    def forward(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        text = self.text_tokens
        q_BHSK = q_BHSK * q_BHSK.shape[-1] ** -0.5
        # split instead of slices, because its backward pass is a single concatenation.
        (q_BHTK, q_BHIK), (k_BHTK, k_BHIK), (v_BHTK, v_BHIK) = (t.split([text, self.grid**2], dim=2) for t in (q_BHSK, k_BHSK, v_BHSK))
        out_BHTK = (q_BHTK @ k_BHTK.transpose(-1, -2) + self.bias_text.to(q_BHSK.dtype)).softmax(-1) @ v_BHTK
        q_BHLXK = self._lines(q_BHIK, kind)
        k_BHLWK, v_BHLWK = (self._windows(self._lines(t, kind), kind) for t in (k_BHIK, v_BHIK))
        text_scores_BHLXT = (q_BHLXK.flatten(2, 3) @ k_BHTK.transpose(-1, -2)).unflatten(2, (self.grid, -1))
        line_scores_BHLXW = q_BHLXK @ k_BHLWK.transpose(-1, -2) + getattr(self, f"bias_{kind}").to(q_BHSK.dtype)
        # One softmax over text and image keys together (paper B.1, footnote 7).
        p_BHLXT, p_BHLXW = torch.cat([text_scores_BHLXT, line_scores_BHLXW], dim=-1).softmax(-1).split([text, line_scores_BHLXW.shape[-1]], dim=-1)
        out_BHLXK = p_BHLXW @ v_BHLWK + (p_BHLXT.flatten(2, 3) @ v_BHTK).unflatten(2, (self.grid, -1))
        if mask_kind(kind).is_transposed:
            out_BHLXK = out_BHLXK.transpose(2, 3)
        return torch.cat([out_BHTK, out_BHLXK.flatten(2, 3)], dim=2)

    def _lines(self, x_BHIK: Tensor, kind: Kind) -> Tensor:
        x_BHYXK = x_BHIK.unflatten(2, (self.grid, -1))
        return x_BHYXK.transpose(2, 3) if mask_kind(kind).is_transposed else x_BHYXK

    def _windows(self, x_BHLXK: Tensor, kind: Kind) -> Tensor:
        before = self.lines_before[kind]
        if not before:
            return x_BHLXK
        padded = F.pad(x_BHLXK, (0, 0, 0, 0, before, 0))
        return torch.cat([padded[:, :, shift : shift + self.grid] for shift in range(before + 1)], dim=3)
