"""Drawing codes: milliseconds a code and codes/s against what reading the weights and the cache costs. ``python -m train.bench.sample``"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from model.config import StreamShape, TransformerConfig
from model.decoder import Drawer, DrawingWeights, Texts, cache_bytes, text_bytes
from model.draw_cache import Window, cache_places
from model.offsets import layer_kinds, offsets_of
from model.transformer import Transformer
from train.bench.harness import Result, main, start
from train.machine.rates import DTYPES, Figure, Options, matmul_rate, measure, threads

GOAL_OF_FLOOR = 0.6
_SIZES = {
    "cpu": (TransformerConfig(layers=8, width=512, heads=8), StreamShape(text_tokens=256, text_vocab=16384, grid=16, image_vocab=8192), (1, 8, 64)),
    "cuda": (
        TransformerConfig(layers=24, width=2048, heads=16),
        StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192),
        (1, 8, 64, 512),
    ),
}
_DTYPE = {"cpu": "fp32", "cuda": "bf16"}
_WINDOWS = (8, 16)
_LEAST_BUFFER, _MOST_BUFFER = 1 << 28, 1 << 31


def run(options: Options) -> Result:
    """Candidates of one caption, and single pictures in windows of drafts; on a CPU with all cores."""
    cfg, shape, batches = _SIZES[options.device]
    return compare(cfg, shape, batches, options)


def compare(cfg: TransformerConfig, shape: StreamShape, batches: tuple[int, ...], options: Options) -> Result:
    """See run."""
    name = _DTYPE[options.device]
    dtype, count = DTYPES[name], os.cpu_count() or 1
    options = replace(options, runs=min(options.runs, 3))
    sizes = {"layers": cfg.layers, "width": cfg.width, "states": shape.states, "dtype": name, "threads": count}
    result = start("sample", "Drawing: one code of each candidate of a caption", options, **sizes)
    torch.manual_seed(0)
    with torch.device(options.device):
        weights = DrawingWeights(Transformer(cfg, shape, branch_dtype=dtype).requires_grad_(False), dtype)
    with threads(count), torch.no_grad():
        result.floor["reading"] = read_rate(options)
        result.floor["products"] = matmul_rate(dtype, options)
        for batch in batches:
            _one(result, weights, batch, options)
        for window in _WINDOWS:
            work = drawing_pass(weights, 1, window, options.device)
            result.measured[f"batch 1, passes with windows of {window}"] = measure(work, 1, "passes/s", options)
            result.ratio(f"pass with a window of {window} over one of 1", f"batch 1, passes with windows of {window}", "batch 1")
    full = 2 * dtype.itemsize * cfg.width * cfg.layers * shape.states
    for batch in batches:
        held = cache_bytes(cfg, shape, dtype.itemsize) + text_bytes(cfg, shape, dtype.itemsize) / batch
        result.notes.append(f"Batch {batch}: the cache takes {held / full:.2f} of one that keeps every state of every layer for every picture.")
    result.notes.append(
        "Floor: the larger of bytes of weights and of what the masks visit over the reading rate, and of operations over the matrix rate, in the same run."
    )
    return result


def _one(result: Result, weights: DrawingWeights, batch: int, options: Options) -> None:
    label = f"batch {batch}"
    result.measured[label] = measure(drawing_pass(weights, batch, 1, options.device), batch, "codes/s", options)
    read, products = step_bytes(weights, batch), step_flops(weights, batch)
    codes = batch / max(read / 1e9 / result.floor["reading"].value, products / 1e9 / result.floor["products"].value)
    result.floor[label + ", floor"] = Figure(codes, codes, codes, "codes/s", options.runs)
    result.ratio(f"{label}, share of the floor", label, label + ", floor", GOAL_OF_FLOOR if batch == 1 else None)


def drawing_pass(weights: DrawingWeights, pictures: int, window: int, device: str) -> Callable[[], object]:
    """A function that computes one pass in the middle of the pictures of one caption, again and again at the same place."""
    shape = weights.shape
    text_CT = torch.zeros(1, shape.text_tokens, dtype=torch.int64, device=device)
    drawer = Drawer(weights, [Texts(text_CT, torch.tensor([8], device=device), pictures)])
    codes_BI = torch.zeros(pictures, shape.image_tokens, dtype=torch.int64, device=device)
    middle = shape.image_tokens // 2 + shape.grid // 2
    drawer.fill(codes_BI, middle)
    at = Window(torch.full((pictures,), middle, device=device), window, middle if window == 1 else None)
    return lambda: drawer.logits(codes_BI, at)


def step_bytes(weights: DrawingWeights, pictures: int) -> float:
    """Bytes that one code of each candidate of a caption must read: the weights, the text once, and what the masks allow of the past."""
    cfg, shape, size = weights.cfg, weights.shape, weights.dtype.itemsize
    matrices = sum(t.numel() for layer in weights.layers for t in (layer.qkv, layer.post, layer.mlp_1, layer.mlp_2))
    head = weights.model.image_unembedding.weight.numel() * 4
    visited = sum(min(len(offsets_of(kind, shape, cfg)), cache_places(kind, shape, cfg)) for kind in layer_kinds(cfg.layers))
    return matrices * size + head + text_bytes(cfg, shape, size) + pictures * 2 * size * cfg.width * visited


def step_flops(weights: DrawingWeights, pictures: int) -> float:
    """Operations of products of one code of each candidate."""
    cfg, shape = weights.cfg, weights.shape
    matrices = sum(t.numel() for layer in weights.layers for t in (layer.qkv, layer.post, layer.mlp_1, layer.mlp_2))
    attention = sum(2 * cfg.width * (shape.text_tokens + len(offsets_of(kind, shape, cfg))) for kind in layer_kinds(cfg.layers))
    return 2.0 * pictures * (matrices + weights.model.image_unembedding.weight.numel() + attention)


def read_rate(options: Options) -> Figure:
    """GB/s of reading a buffer of four times the last cache, with the present number of threads."""
    count = min(_MOST_BUFFER, max(_LEAST_BUFFER, 4 * last_cache())) if options.device == "cpu" else _MOST_BUFFER
    buffer = torch.zeros(count // 4, device=options.device)
    return measure(lambda: float(buffer.sum()), 1e-9 * count, "GB/s", options)


def last_cache() -> int:
    """Bytes of the last cache of a CPU, as Linux has it; 0 where it does not say."""
    try:
        text = max(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")).joinpath("size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError):
        return 0


if __name__ == "__main__":
    main(run)
