"""Bytes of live tensors, and how much of them activation checkpointing saves. ``launcher.py bench memory``

The bytes are counted, not sampled: every storage is followed from its creation until it is freed. So the figures are the same on every machine and in every run.
"""

from __future__ import annotations

import gc

import torch

from model.attention_engines import EngineName, make_engine
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer
from train.bench.harness import Result, main, start
from train.machine.live_bytes import LiveBytes
from train.machine.rates import DTYPES, Figure, Options

_SIZES = {
    "cpu": (TransformerConfig(layers=8, width=256, heads=4), StreamShape(text_tokens=64, text_vocab=2048, grid=16, image_vocab=1024), 2),
    "cuda": (TransformerConfig(layers=24, width=2048, heads=32), StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192), 4),
}
"""Device -> configuration, shape of the stream, and batch."""


def train_peak(model: Transformer, batch: int, device: str) -> tuple[int, int]:
    """Bytes of one forward and backward pass on random tokens, in addition to those before: at the end of the forward pass, and at the peak.

    The peak includes the gradients of parameters, unless they existed before.
    """
    shape = model.shape
    text_BT = torch.randint(shape.text_vocab, (batch, shape.text_tokens), device=device)
    lengths_B = torch.full((batch,), shape.text_tokens, device=device)
    codes_BI = torch.randint(shape.image_vocab, (batch, shape.image_tokens), device=device)
    live = LiveBytes()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for tensor in (*model.parameters(), *gradients, *model.buffers(), text_BT, lengths_B, codes_BI):
        live.follow(tensor)
    before = live.now
    gc.collect()  # so that reference cycles from before are not freed during the measurement
    with live:
        live.restart()
        text_nll_BT, image_nll_BI = model(text_BT, lengths_B, codes_BI)
        loss = text_nll_BT.mean() / 8 + image_nll_BI.mean() * 7 / 8
        del text_nll_BT, image_nll_BI
        kept = live.now - before
        loss.backward()
    return kept, live.peak - before


def build(
    cfg: TransformerConfig, shape: StreamShape, engine: EngineName, dtype: str, checkpoint_every: int, device: str, logits: str = "fp32"
) -> Transformer:
    """Build a model with the named attention engine. ``logits`` names the dtype that the heads' products read."""
    torch.manual_seed(0)
    place = torch.device(device)
    attend = make_engine(engine, cfg, shape, place)
    return Transformer(cfg, shape, branch_dtype=DTYPES[dtype], attend=attend, checkpoint_every=checkpoint_every, logits_dtype=DTYPES[logits]).to(
        place
    )


def run(options: Options) -> Result:
    """Measure the bytes of a forward and backward pass, without checkpointing and with n resblocks recomputed together."""
    cfg, shape, batch = _SIZES[options.device]
    engine: EngineName = "structured" if options.device == "cpu" else "flex"
    sizes = {"layers": cfg.layers, "width": cfg.width, "heads": cfg.heads, "states": shape.states, "batch": batch, "dtype": "bf16", "engine": engine}
    result = start("memory", "Activation checkpointing: live tensors of forward + backward, gradients included", options, **sizes)
    for every in (0, 1, 2, 4, 8):
        name = f"checkpoint every {every}" if every else "no checkpointing"
        model = build(cfg, shape, engine, "bf16", every, options.device)
        train_peak(model, batch, options.device)  # creates the gradients, which exist in every training step but the first
        kept, peak = train_peak(model, batch, options.device)
        result.measured[f"kept by the forward pass, {name}"] = _megabytes(kept)
        result.measured[f"peak, {name}"] = _megabytes(peak)
    result.ratio("kept, every resblock over none", "kept by the forward pass, checkpoint every 1", "kept by the forward pass, no checkpointing")
    result.notes.append("Bytes are counted exactly (every storage from its making to its end) beyond parameters and gradients.")
    return result


def _megabytes(count: int) -> Figure:
    return Figure(count / 1e6, count / 1e6, count / 1e6, "MB", 1)


if __name__ == "__main__":
    main(run)
