"""Drawing codes: milliseconds for a code and codes/s, compared with the time of reading the weights and the cache. ``python -m train.bench.sample``"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from model.config import StreamShape, TransformerConfig
from model.decoder import DrawingWeights, Texts, cache_bytes, text_bytes
from model.draw_cache import Window, cache_places
from model.offsets import layer_kinds, offsets_of
from model.sampling import begin
from model.transformer import Transformer
from train.bench import peer_dalle
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
    """Measure several candidates of one caption, and single pictures with windows of drafts; on a CPU with all cores."""
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
        model = Transformer(cfg, shape, branch_dtype=dtype).requires_grad_(False)
    weights = _ready(model, dtype) if options.device == "cpu" else DrawingWeights(model, dtype)
    with threads(count), torch.no_grad():
        result.floor["reading"] = read_rate(options)
        result.floor["products"] = matmul_rate(dtype, options)
        for batch in batches:
            _one(result, weights, f"batch {batch}", batch, 1, options, GOAL_OF_FLOOR if batch == 1 else None)
        _one(result, weights, f"{batches[-1]} captions", batches[-1], batches[-1], options)
        for window in _WINDOWS:
            label = f"batch 1, passes with windows of {window}"
            result.measured[label] = measure(drawing_pass(weights, window, options.device), 1, "passes/s", options)
            result.ratio(f"pass with a window of {window} over one of 1", label, "batch 1")
        if options.device == "cpu":
            _more_on_a_cpu(result, model, options)
    full = 2 * dtype.itemsize * cfg.width * cfg.layers * shape.states
    for batch in batches:
        held = cache_bytes(cfg, shape, dtype.itemsize) + text_bytes(cfg, shape, dtype.itemsize) / batch
        result.notes.append(f"Batch {batch}: the cache takes {held / full:.2f} of one that keeps every state of every layer for every picture.")
    result.notes.append(
        "Floor: the larger of bytes of weights and of what the masks visit over the reading rate, and of operations over the matrix rate, in the same run. "
        "A code is measured whole: logits, noise, and the drawing from them."
    )
    return result


def _one(result: Result, weights: DrawingWeights, label: str, pictures: int, captions: int, options: Options, goal: float | None = None) -> None:
    result.measured[label] = measure(drawing_step(weights, pictures, captions, options.device), pictures, "codes/s", options)
    read, products = step_bytes(weights, pictures, captions), step_flops(weights, pictures)
    codes = pictures / max(read / 1e9 / result.floor["reading"].value, products / 1e9 / result.floor["products"].value)
    result.floor[label + ", floor"] = Figure(codes, codes, codes, "codes/s", options.runs)
    result.ratio(f"{label}, share of the floor", label, label + ", floor", goal)


def _ready(model: Transformer, dtype: torch.dtype, *, eight_bits: bool = False) -> DrawingWeights:
    """The weights as they are prepared for drawing on a CPU. Imported here, because the kernels need numba, and on a GPU the benchmark needs only torch."""
    weights: DrawingWeights = import_module("train.drawing.cpu_drawer").ready(model, dtype, eight_bits=eight_bits)
    return weights


def _more_on_a_cpu(result: Result, model: Transformer, options: Options) -> None:
    """Measure weights of eight bits, torch's own products, and the peer."""
    result.measured["batch 1, int8"] = measure(drawing_step(_ready(model, torch.float32, eight_bits=True), 1, 1, "cpu"), 1, "codes/s", options)
    result.ratio("int8 over fp32", "batch 1, int8", "batch 1")
    result.measured["batch 1, torch's products"] = measure(drawing_step(DrawingWeights(model), 1, 1, "cpu"), 1, "codes/s", options)
    result.ratio("kernels over torch's products", "batch 1", "batch 1, torch's products")
    if peer_dalle.find("dalle_pytorch") is None:
        result.notes.append("dalle-pytorch is not installed ('make bench-peers').")
        return
    label = "dalle-pytorch 1.6.6, batch 1 with its cache"
    result.peers[label] = measure(peer_dalle.drawing_step(model.cfg, model.shape), 1, "codes/s", options)
    result.ratio("batch 1 over dalle-pytorch", "batch 1", label)


def drawing_step(weights: DrawingWeights, pictures: int, captions: int, device: str) -> Callable[[], object]:
    """A function that draws one code in the middle of each picture. Every call draws at the same position."""
    shape = weights.shape
    middle = shape.image_tokens // 2 + shape.grid // 2
    text_CT = torch.zeros(captions, shape.text_tokens, dtype=torch.int64, device=device)
    prefix_BP = torch.zeros(pictures, middle, dtype=torch.int64, device=device)
    drawing = begin(weights, text_CT, torch.full((captions,), min(8, text_CT.shape[1]), device=device), range(pictures), prefix_BP=prefix_BP)

    def step() -> None:
        drawing.step()
        drawing.known_B.fill_(middle)
        drawing.least = middle

    return step


def drawing_pass(weights: DrawingWeights, window: int, device: str) -> Callable[[], object]:
    """A function that computes one pass over several positions in the middle of one picture. Every call computes the same positions."""
    shape = weights.shape
    text_CT = torch.zeros(1, shape.text_tokens, dtype=torch.int64, device=device)
    drawer = weights.drawer([Texts(text_CT, torch.tensor([min(8, text_CT.shape[1])], device=device), 1)])
    codes_BI = torch.zeros(1, shape.image_tokens, dtype=torch.int64, device=device)
    middle = shape.image_tokens // 2 + shape.grid // 2
    drawer.fill(codes_BI, middle)
    at = Window(torch.full((1,), middle, device=device), window)
    return lambda: drawer.logits(codes_BI, at)


def step_bytes(weights: DrawingWeights, pictures: int, captions: int = 1) -> float:
    """Bytes that must be read to draw one code of each picture: the weights, each caption's keys and values once, and the earlier positions that the masks allow."""
    cfg, shape, size = weights.cfg, weights.shape, weights.dtype.itemsize
    matrices = sum(t.numel() for layer in weights.layers for t in (layer.qkv, layer.post, layer.mlp_1, layer.mlp_2))
    head = weights.model.image_unembedding.weight.numel() * 4
    visited = sum(min(len(offsets_of(kind, shape, cfg)), cache_places(kind, shape, cfg)) for kind in layer_kinds(cfg.layers))
    return matrices * size + head + captions * text_bytes(cfg, shape, size) + pictures * 2 * size * cfg.width * visited


def step_flops(weights: DrawingWeights, pictures: int) -> float:
    """Operations of the matrix products for one code of each picture."""
    cfg, shape = weights.cfg, weights.shape
    matrices = sum(t.numel() for layer in weights.layers for t in (layer.qkv, layer.post, layer.mlp_1, layer.mlp_2))
    attention = sum(2 * cfg.width * (shape.text_tokens + len(offsets_of(kind, shape, cfg))) for kind in layer_kinds(cfg.layers))
    return 2.0 * pictures * (matrices + weights.model.image_unembedding.weight.numel() + attention)


def read_rate(options: Options) -> Figure:
    """GB/s of reading a buffer four times as large as the last-level cache, with the current number of threads."""
    count = min(_MOST_BUFFER, max(_LEAST_BUFFER, 4 * last_cache())) if options.device == "cpu" else _MOST_BUFFER
    buffer = torch.zeros(count // 4, device=options.device)
    return measure(lambda: float(buffer.sum()), 1e-9 * count, "GB/s", options)


def last_cache() -> int:
    """Bytes of the CPU's last-level cache according to Linux; 0 if that is not known."""
    try:
        text = max(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")).joinpath("size").read_text().strip()
        return int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
    except (OSError, ValueError, KeyError):
        return 0


if __name__ == "__main__":
    main(run)
