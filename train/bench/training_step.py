"""The training step of a transformer that benchmarks measure."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.attention_engines import EngineName
from model.config import StreamShape, TransformerConfig
from train.bench.memory import build
from train.machine.rates import Figure


def scaled(figure: Figure, factor: float, unit: str) -> Figure:
    """Convert a figure to another unit."""
    return Figure(figure.value * factor, figure.min * factor, figure.max * factor, unit, figure.runs)


def training_step(
    cfg: TransformerConfig,
    shape: StreamShape,
    batch: int,
    dtype: str,
    device: str,
    engine: EngineName,
    *,
    checkpoint_every: int = 0,
    logits: str = "fp32",
) -> Callable[[], None]:
    """A function that does one update on fixed, random tokens."""
    model = build(cfg, shape, engine, dtype, checkpoint_every, device, logits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text_BT = torch.randint(2, shape.text_vocab, (batch, shape.text_tokens), device=device)
    lengths_B = torch.full((batch,), shape.text_tokens, device=device)
    codes_BI = torch.randint(shape.image_vocab, (batch, shape.image_tokens), device=device)

    def step() -> None:
        text_nll_BT, image_nll_BI = model(text_BT, lengths_B, codes_BI)
        loss = cfg.text_loss_weight * text_nll_BT.mean() + (1 - cfg.text_loss_weight) * image_nll_BI.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
