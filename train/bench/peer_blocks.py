"""Two plain decoders as peers of the transformer's training step, written as nanoGPT and LlamaGen write theirs: bf16 autocast, torch's fused causal attention,
torch.compile, fused AdamW. At equal depth, width, heads, vocabularies and logits, so that what differs is the block and its attention.

B batch, S states, D width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import StreamShape, TransformerConfig

Kind = Literal["nanoGPT", "LlamaGen"]
KINDS: tuple[Kind, ...] = ("nanoGPT", "LlamaGen")
_ROPE_BASE = 10_000.0
_MULTIPLE = 256  # LlamaGen rounds the width of its MLP up to a multiple of this


class NanoBlock(nn.Module):
    """nanoGPT's: layer norm before attention and before an MLP of four times the width with GELU; biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BSD: Tensor, turn_SK: Tensor) -> Tensor:
        q_BSD, k_BSD, v_BSD = self.qkv(self.norm_1(x_BSD)).chunk(3, -1)
        x_BSD = x_BSD + self.out(_attend(q_BSD, k_BSD, v_BSD, self.heads, None))
        return x_BSD + self.down(F.gelu(self.up(self.norm_2(x_BSD))))


class LlamaBlock(nn.Module):
    """LlamaGen's: root-mean-square norm, rotary positions, a gated MLP (SwiGLU) of 8/3 of the width; no biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        inner = -(-(8 * width // 3) // _MULTIPLE) * _MULTIPLE
        self.gate, self.up, self.down = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, inner, bias=False),
            nn.Linear(inner, width, bias=False),
        )

    def forward(self, x_BSD: Tensor, turn_SK: Tensor) -> Tensor:
        q_BSD, k_BSD, v_BSD = self.qkv(self.norm_1(x_BSD)).chunk(3, -1)
        x_BSD = x_BSD + self.out(_attend(q_BSD, k_BSD, v_BSD, self.heads, turn_SK))
        h_BSD = self.norm_2(x_BSD)
        return x_BSD + self.down(F.silu(self.gate(h_BSD)) * self.up(h_BSD))


def _attend(q_BSD: Tensor, k_BSD: Tensor, v_BSD: Tensor, heads: int, turn_SK: Tensor | None) -> Tensor:
    """Causal attention of every state to all before it."""
    q_BHSK, k_BHSK, v_BHSK = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q_BSD, k_BSD, v_BSD))
    if turn_SK is not None:
        q_BHSK, k_BHSK = _turned(q_BHSK, turn_SK), _turned(k_BHSK, turn_SK)
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, is_causal=True).transpose(1, 2).flatten(2)


def _turned(t_BHSK: Tensor, turn_SK: Tensor) -> Tensor:
    """Rotary positions: halves of a head turned by angles whose cosines and sines stand one after the other in ``turn_SK``."""
    cos, sin = turn_SK.to(t_BHSK.dtype).chunk(2, -1)
    a, b = t_BHSK.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class Decoder(nn.Module):
    """Text, then image codes, each with an embedding and a head of its own, as ours has: no logits of the other kind are computed."""

    def __init__(self, kind: Kind, cfg: TransformerConfig, shape: StreamShape) -> None:
        super().__init__()
        self.shape = shape
        self.text, self.image = nn.Embedding(shape.text_vocab, cfg.width), nn.Embedding(shape.image_vocab, cfg.width)
        self.position = nn.Embedding(shape.states, cfg.width) if kind == "nanoGPT" else None
        block: type[Any] = NanoBlock if kind == "nanoGPT" else LlamaBlock
        self.blocks = nn.ModuleList(block(cfg.width, cfg.heads) for _ in range(cfg.layers))
        self.norm = nn.LayerNorm(cfg.width) if kind == "nanoGPT" else nn.RMSNorm(cfg.width)
        self.text_head = nn.Linear(cfg.width, shape.text_vocab, bias=False)
        self.image_head = nn.Linear(cfg.width, shape.image_vocab, bias=False)
        half = cfg.width // cfg.heads // 2
        angles = torch.outer(torch.arange(shape.states), _ROPE_BASE ** (-torch.arange(half) / half))
        self.register_buffer("turn", torch.cat([angles.cos(), angles.sin()], -1), persistent=False)

    def forward(self, text_BT: Tensor, codes_BI: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropies of the text tokens but the first, and of the codes, each predicted from all that comes before."""
        x_BSD = torch.cat([self.text(text_BT), self.image(codes_BI)], 1)
        if self.position is not None:
            x_BSD = x_BSD + self.position.weight
        for block in self.blocks:
            x_BSD = block(x_BSD, self.turn)
        x_BSD = self.norm(x_BSD)
        text = text_BT.shape[1]
        text_logits, image_logits = self.text_head(x_BSD[:, : text - 1]), self.image_head(x_BSD[:, text - 1 : -1])
        return F.cross_entropy(text_logits.flatten(0, 1).float(), text_BT[:, 1:].flatten()), F.cross_entropy(
            image_logits.flatten(0, 1).float(), codes_BI.flatten()
        )


def training_step(
    kind: Kind, cfg: TransformerConfig, shape: StreamShape, batch: int, dtype: torch.dtype, device: str, *, compiled: bool
) -> Callable[[], float]:
    """A function that does one update on fixed, random tokens, and returns its loss; the first call compiles."""
    torch.manual_seed(0)
    model = Decoder(kind, cfg, shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward: Any = torch.compile(model) if compiled else model
    text_BT = torch.randint(shape.text_vocab, (batch, shape.text_tokens), device=device)
    codes_BI = torch.randint(shape.image_vocab, (batch, shape.image_tokens), device=device)

    def step() -> float:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            text, image = forward(text_BT, codes_BI)
        loss = cfg.text_loss_weight * text + (1 - cfg.text_loss_weight) * image
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step
