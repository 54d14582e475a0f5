"""Training step of a small transformer against the matrix rate of the same run. ``python -m train.bench.transformer``"""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.config import StreamShape, TransformerConfig
from model.masks import dense_mask, layer_kinds
from model.transformer import Transformer
from train.bench.harness import DTYPES, Options, Result, main, matmul_rate, measure, start, threads

_SIZES = {
    "cpu": (TransformerConfig(layers=8, width=256, heads=8), StreamShape(text_tokens=32, text_vocab=2048, grid=16, image_vocab=512), 8),
    "cuda": (TransformerConfig(layers=24, width=1920, heads=30), StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192), 8),
}
"""Configuration, stream and batch by device."""


def run(options: Options) -> Result:
    """Tokens/s of forward + backward + AdamW, by dtype of the branches; on a CPU in one thread, as one process of the demo runs."""
    cfg, shape, batch = _SIZES[options.device]
    return compare(cfg, shape, batch, options)


def compare(cfg: TransformerConfig, shape: StreamShape, batch: int, options: Options) -> Result:
    """See run."""
    flops = train_flops(cfg, shape)
    sizes = {"layers": cfg.layers, "width": cfg.width, "heads": cfg.heads, "states": shape.states, "image_tokens": shape.image_tokens}
    result = start("transformer", "Transformer: training step", options, **sizes, batch=batch, gflop_per_sample=round(flops / 1e9, 3), threads=1)
    dtypes = ("fp32", "bf16")
    with threads(1):
        for name in dtypes:
            result.floor[f"matmul {name}"] = matmul_rate(DTYPES[name], options)
            step = training_step(cfg, shape, batch, DTYPES[name], options.device)
            figure = measure(step, batch * shape.states, "tokens/s", options)
            result.measured[f"training step {name}"] = figure
            per_token = flops / shape.states / 1e9
            spread = {"value": figure.value * per_token, "min": figure.min * per_token, "max": figure.max * per_token}
            result.measured[f"useful arithmetic {name}"] = type(figure)(**spread, unit="GFLOP/s", runs=figure.runs)
            result.ratio(
                f"share of the matrix rate, {name}", f"useful arithmetic {name}", f"matmul {name}", goal=0.6 if options.device == "cuda" else None
            )
    result.notes.append(
        "Useful arithmetic: matrix products that the model needs, attention over pairs that its masks allow, each head at its own positions."
    )
    return result


def train_flops(cfg: TransformerConfig, shape: StreamShape) -> float:
    """Floating-point operations of one sample's forward and backward pass that cannot be left out (no recomputation, no masked pairs)."""
    matrices = cfg.layers * 12 * cfg.width**2 * shape.states
    heads = cfg.width * (shape.text_tokens * shape.text_vocab + shape.image_tokens * shape.image_vocab)
    pairs = sum(int(dense_mask(kind, shape, cfg).sum()) for kind in layer_kinds(cfg.layers))
    # Two operations a product; the backward pass computes two products for each of the forward pass.
    return 3.0 * 2 * (matrices + heads + 2 * cfg.width * pairs)


def training_step(cfg: TransformerConfig, shape: StreamShape, batch: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A function that does one update on fixed, random tokens."""
    torch.manual_seed(0)
    model = Transformer(cfg, shape, branch_dtype=dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
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


if __name__ == "__main__":
    main(run)
