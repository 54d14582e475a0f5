"""The transformer's training step beside two strong, plain decoders (train/bench/peer_blocks.py) in the same run. ``launcher.py bench training-peers``

On a CPU, two layers of the width of ``bench model`` at its shapes; on CUDA, the sizes of 1.2B.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from model.attention_engines import EngineName
from model.config import StreamShape, TransformerConfig
from train.bench import peer_blocks
from train.bench.harness import Result, main, start
from train.bench.training_step import training_step
from train.machine.rates import DTYPES, Options, matmul_rate, measure_in_turns, threads

GOAL = 1.0
_SIZES = {"cpu": (TransformerConfig(layers=4, width=512, heads=8), 2), "cuda": (TransformerConfig(layers=24, width=2048, heads=32), 8)}
_SHAPE = StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
_DTYPE = "bf16"
_LOGITS = ("fp32", "bf16")
"""Ours with the paper's products at the heads, and with those of the peers (dalle_fit.logits)."""


def run(options: Options) -> Result:
    """Measure one update of each at the paper's shape of 256 + 1,024 states."""
    cfg, batch = _SIZES[options.device]
    return compare(cfg, _SHAPE, batch, options, engine="flex" if options.device == "cuda" else "structured")


def compare(cfg: TransformerConfig, shape: StreamShape, batch: int, options: Options, *, engine: EngineName, compiled: bool = True) -> Result:
    """Tokens/s of forward pass, backward pass and AdamW: ours, and each peer's, compiled and not."""
    count = os.cpu_count() or 1
    sizes = {"layers": cfg.layers, "width": cfg.width, "heads": cfg.heads, "batch": batch, "states": f"{shape.text_tokens} + {shape.image_tokens}"}
    result = start("training-peers", "Training step beside plain decoders", options, **sizes, precision=_DTYPE, engine=engine, threads=count)
    ours = [f"ours, {_DTYPE}, logits in {logits}" for logits in _LOGITS]
    with threads(count):
        result.floor[f"matmul {_DTYPE}"] = matmul_rate(DTYPES[_DTYPE], options)
        works: dict[str, Callable[[], object]] = {
            name: training_step(cfg, shape, batch, _DTYPE, options.device, engine, logits=logits) for name, logits in zip(ours, _LOGITS, strict=True)
        }
        theirs: dict[str, list[str]] = {}
        for kind in peer_blocks.KINDS:
            for compiling in (False, True)[: 1 + compiled]:
                name = f"{kind}-style, {_DTYPE}, {'torch.compile' if compiling else 'eager'}"
                theirs.setdefault(kind, []).append(name)
                works[name] = peer_blocks.training_step(kind, cfg, shape, batch, DTYPES[_DTYPE], options.device, compiled=compiling)
        for name, figure in measure_in_turns(works, batch * shape.states, "tokens/s", options).items():
            (result.measured if name in ours else result.peers)[name] = figure
    for style, names in theirs.items():
        best = max(names, key=lambda name: result.peers[name].value)
        result.ratio(f"ours over the {style}-style decoder at its best", max(ours, key=lambda name: result.measured[name].value), best, goal=GOAL)
    result.notes += [
        "Peers: written for this comparison after nanoGPT's and LlamaGen's blocks, with autocast, torch's fused causal attention and fused AdamW, at equal depth, width, heads, "
        "vocabularies, batch and logits (text at text positions, codes at code positions; their products in bf16, the loss in fp32). Their attention is dense and causal, ours the paper's masks: "
        "less arithmetic, in kernels that are less used. LlamaGen's MLP has as many weights as nanoGPT's and ours (8/3 three times, 4 twice), rounded up to a multiple of 256.",
        "All are measured in turns, after a first update of each, which compiles.",
        "Ours is not compiled: blocks are as the stage dalle trains them.",
    ]
    return result


if __name__ == "__main__":
    main(run)
