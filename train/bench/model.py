"""The training step of the transformer, compared with the matrix rate of the same run and with dalle-pytorch; and attention with each engine.
``python -m train.bench.model``"""

from __future__ import annotations

import os
from dataclasses import replace

from model.config import StreamShape, TransformerConfig
from train.bench import peer_dalle
from train.bench.harness import Result, main, start
from train.bench.training_step import scaled, training_step
from train.machine import attention_times
from train.machine.rates import DTYPES, Options, matmul_rate, measure, threads
from train.planning.flops import train_flops

GOAL_OVER_PEER = 3.0
_CFG = TransformerConfig(layers=8, width=512, heads=8)
_SHAPES = tuple(StreamShape(text_tokens=256, text_vocab=16384, grid=grid, image_vocab=8192) for grid in (16, 32))
_BATCH = 2
_SMALL = (
    (TransformerConfig(layers=4, width=32, heads=2, conv_kernel=3), StreamShape(text_tokens=16, text_vocab=400, grid=4, image_vocab=32), 8),
    (TransformerConfig(layers=4, width=128, heads=4, conv_kernel=5), StreamShape(text_tokens=40, text_vocab=1000, grid=16, image_vocab=512), 16),
)
"""Sizes of the presets tiny and demo, with the batch of one process. Only their attention is measured."""


def run(options: Options) -> Result:
    """On a CPU, measure the model with 8 layers and width 512, and the peer. On CUDA, see train/bench/model_cuda.py."""
    if options.device == "cuda":
        from train.bench.model_cuda import run_cuda

        return run_cuda(options)
    return compare(_CFG, _SHAPES, _BATCH, replace(options, runs=min(options.runs, 3)), _SMALL)


def compare(
    cfg: TransformerConfig,
    shapes: tuple[StreamShape, ...],
    batch: int,
    options: Options,
    small: tuple[tuple[TransformerConfig, StreamShape, int], ...] = (),
) -> Result:
    """Measure tokens/s of forward pass + backward pass + AdamW for each shape: ours for each dtype, the peer's for each dtype and attention. Also milliseconds of
    attention for each engine.

    On the first shape, all dtypes of the peer are measured; on the others, only the faster one.
    """
    count = os.cpu_count() or 1
    sizes = {"layers": cfg.layers, "width": cfg.width, "heads": cfg.heads, "batch": batch, "text_vocab": shapes[0].text_vocab}
    result = start("model", "Model: training step and attention", options, **sizes, image_vocab=shapes[0].image_vocab, threads=count)
    peer_dtypes: tuple[str, ...] = ("fp32", "bf16")
    with threads(count):
        for dtype in ("fp32", "bf16"):
            result.floor[f"matmul {dtype}"] = matmul_rate(DTYPES[dtype], options)
        for shape in shapes:
            _ours(result, cfg, shape, batch, options)
            if peer_dalle.find("dalle_pytorch") is not None:
                peer_dtypes = _theirs(result, cfg, shape, batch, options, peer_dtypes)
        for small_cfg, small_shape, small_batch in (*small, *((cfg, shape, batch) for shape in shapes)):
            attention_times.times(small_cfg, small_shape, small_batch, ("fp32", "bf16"), options, result.measured)
    result.notes += [
        "Useful arithmetic: matrix products that the model needs, attention over pairs that its masks allow, each head at its own positions.",
        'Attention: one layer forward and backward, mean over the layers of such a model. `dalle.attention = "auto"` reads the best of these times.',
    ]
    if options.device == "cpu":
        result.notes.append(
            "Open, because no GPU has run train/bench/model_cuda.py yet: at 1.2B on an H100, useful arithmetic of at least 60 % of the measured matrix rate "
            "(50 % when recomputing) and above llm-foundry's 401 TFLOP/s; attention in at most 0.6 of FlexAttention-causal's time, and not slower than "
            "the fastest causal SDPA kernel."
        )
    if result.peers:
        result.notes.append(
            "Peer: dalle-pytorch 1.6.6 with equal depth, width, heads, vocabularies, batch and optimizer. Its MLP is gated and so has half as many matrices "
            "again, it computes all logits at all positions, and under autocast its logits are bf16; ours are fp32 (paper D.2) but where the name says bf16 (dalle_fit.logits)."
        )
    return result


def _states(shape: StreamShape) -> str:
    return f"{shape.text_tokens}+{shape.image_tokens} states"


def _ours(result: Result, cfg: TransformerConfig, shape: StreamShape, batch: int, options: Options) -> None:
    flops = train_flops(cfg, shape)
    for dtype, logits in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
        what = f"{dtype}, logits in {logits}" if logits != "fp32" else dtype
        name = f"training step {what}, {_states(shape)}"
        step = training_step(cfg, shape, batch, dtype, options.device, "structured", logits=logits)
        result.measured[name] = figure = measure(step, batch * shape.states, "tokens/s", options)
        arithmetic = f"useful arithmetic {what}, {_states(shape)}"
        result.measured[arithmetic] = scaled(figure, flops / shape.states / 1e9, "GFLOP/s")
        result.ratio(f"share of the matrix rate, {what}, {_states(shape)}", arithmetic, f"matmul {dtype}")


def _theirs(result: Result, cfg: TransformerConfig, shape: StreamShape, batch: int, options: Options, dtypes: tuple[str, ...]) -> tuple[str, ...]:
    """Measure the peer, and return the dtype of its fastest variant."""
    found: dict[str, str] = {}
    for kind, pattern in (("full", ("full",)), ("axial", peer_dalle.attention_pattern(cfg.layers))):
        for dtype in dtypes:
            name = f"dalle-pytorch, {kind} attention, {dtype}, {_states(shape)}"
            step = peer_dalle.training_step(cfg, shape, batch, DTYPES[dtype], options.device, pattern)
            result.peers[name] = measure(step, batch * shape.states, "tokens/s", options)
            found[name] = dtype
    best = max(found, key=lambda name: result.peers[name].value)
    ours = max(
        (name for name in result.measured if name.startswith("training step") and name.endswith(_states(shape))),
        key=lambda n: result.measured[n].value,
    )
    result.ratio(f"ours over dalle-pytorch at its best, {_states(shape)}", ours, best, goal=GOAL_OVER_PEER)
    return (found[best],)


if __name__ == "__main__":
    main(run)
