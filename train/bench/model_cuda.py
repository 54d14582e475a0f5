"""The model with 1.2 billion parameters on one GPU: tokens/s, fraction of the matrix rate, attention compared with causal kernels, peak memory. Not yet run on a
GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from model import sdpa
from model.attention import DenseAttention
from model.attention_engines import ENGINES, EngineName, why_unavailable
from model.config import StreamShape, TransformerConfig
from model.flex import FlexAttention
from train.bench.harness import Result, start
from train.machine import attention_times
from train.machine.rates import DTYPES, Figure, Options, matmul_rate, measure
from train.planning.flops import train_flops
from train.planning.hardware import find_by_device_name

_CFG = TransformerConfig(layers=24, width=2048, heads=32)
_SHAPE = StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
_BATCH = {0: 8, 1: 16}
"""checkpoint_every -> samples in a batch."""
_GOALS = {0: 0.6, 1: 0.5}
"""checkpoint_every -> goal for the rate of useful arithmetic, as a fraction of the measured matrix rate."""
LLM_FOUNDRY_TFLOPS = 401.0
"""What llm-foundry publishes for an H100 and a model of 1.3 billion parameters at 2,048 tokens, without recomputation."""
_GOAL_OVER_FLEX_CAUSAL, _GOAL_OVER_SDPA = 1 / 0.6, 1.0


def run_cuda(options: Options) -> Result:
    """Run the benchmark; see the module's docstring."""
    result = start(
        "model", "Model: training step and attention", options, layers=_CFG.layers, width=_CFG.width, heads=_CFG.heads, states=_SHAPE.states
    )
    for dtype in ("bf16", "fp16"):
        result.floor[f"matmul {dtype}"] = matmul_rate(DTYPES[dtype], options)
    gpu = find_by_device_name(str(result.device["name"]))
    if gpu is not None:
        peak = gpu.tflops_16bit * 1e3
        result.floor["datasheet, 16 bits"] = Figure(peak, peak, peak, "GFLOP/s", 1)
    _attention(result, options)
    engine = min(ENGINES, key=lambda name: _time_of(result, name))
    result.settings["engine"] = engine
    for dtype in ("bf16", "fp16"):
        for every in (0, 1):
            _step(result, engine, dtype, every, options)
    return result


def _time_of(result: Result, engine: EngineName) -> float:
    point = attention_times.AttentionPoint.of(engine, "bf16", _CFG, _SHAPE)
    figure = result.measured.get(str(point))
    return float("inf") if figure is None else figure.value


def _step(result: Result, engine: EngineName, dtype: str, every: int, options: Options) -> None:
    from train.bench.training_step import scaled, training_step

    batch, flops = _BATCH[every], train_flops(_CFG, _SHAPE)
    words = f"{dtype}, {'recomputing every resblock' if every else 'without recomputation'}"
    torch.cuda.reset_peak_memory_stats()
    figure = measure(training_step(_CFG, _SHAPE, batch, dtype, "cuda", engine, checkpoint_every=every), batch * _SHAPE.states, "tokens/s", options)
    memory = torch.cuda.max_memory_allocated() / 1e9
    result.measured[f"training step {words}"] = figure
    result.measured[f"peak memory {words}"] = Figure(memory, memory, memory, "GB", 1)
    result.measured[f"useful arithmetic {words}"] = scaled(figure, flops / _SHAPE.states / 1e9, "GFLOP/s")
    result.ratio(f"share of the matrix rate, {words}", f"useful arithmetic {words}", f"matmul {dtype}", goal=_GOALS[every])
    if "datasheet, 16 bits" in result.floor:
        result.ratio(f"share of the datasheet, {words}", f"useful arithmetic {words}", "datasheet, 16 bits")
    if not every and "H100" in str(result.device["name"]):
        rate = LLM_FOUNDRY_TFLOPS * 1e3
        result.peers["llm-foundry, published"] = Figure(rate, rate, rate, "GFLOP/s", 1)
        result.ratio(f"over llm-foundry, {words}", f"useful arithmetic {words}", "llm-foundry, published", goal=1.0)
    torch.cuda.empty_cache()


def _attention(result: Result, options: Options) -> None:
    """Measure our engines, FlexAttention with several block sizes, and causal kernels on the same tensors."""
    batch = _BATCH[0]
    # The engines are measured one by one, so that the others' figures are kept if one does not fit into memory or does not compile.
    attention_times.times(_CFG, _SHAPE, batch, ("bf16", "fp16"), options, result.measured)
    causal = _causal_kernels()
    for name, kernel in causal.items():
        step, layers = attention_times.mean_step(lambda q, k, v, kind, kernel=kernel: kernel(q, k, v), _CFG, _SHAPE, batch, torch.bfloat16, "cuda")
        try:
            result.peers[name] = attention_times.milliseconds(measure(step, float(layers), "layers/s", replace(options, runs=3)))
        except RuntimeError as error:
            result.notes.append(f"{name}: {str(error).splitlines()[0]}")
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        _dense_by(result, backend, batch, options)
    if why_unavailable("flex", torch.device("cuda"), _CFG):
        return
    ours = {}
    for block in (128, 64):
        step, layers = attention_times.mean_step(FlexAttention(_CFG, _SHAPE, block=block).cuda(), _CFG, _SHAPE, batch, torch.bfloat16, "cuda")
        name = f"attention by blocks of {block}, bf16"
        result.measured[name] = ours[name] = attention_times.milliseconds(measure(step, float(layers), "layers/s", options))
    best = min(ours, key=lambda name: ours[name].value)
    for words, goal in (("FlexAttention, causal", _GOAL_OVER_FLEX_CAUSAL), ("SDPA, causal", _GOAL_OVER_SDPA)):
        rivals = [name for name in result.peers if name.startswith(words)]
        if rivals:
            fastest = min(rivals, key=lambda name: result.peers[name].value)
            # Both are times, so theirs divided by ours says how many times as fast ours is.
            result.ratio(f"{words}, over ours", fastest, best, goal=goal)


def _dense_by(result: Result, backend: SDPBackend, batch: int, options: Options) -> None:
    """Measure the dense engine with one of the two kernels among which torch chooses."""

    def kernel(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=is_causal)

    name = f"attention dense by {backend.name.lower().replace('_', ' ')}, bf16"
    try:
        with sdpa.with_kernel(kernel):
            step, layers = attention_times.mean_step(DenseAttention(_CFG, _SHAPE).cuda(), _CFG, _SHAPE, batch, torch.bfloat16, "cuda")
            result.measured[name] = attention_times.milliseconds(measure(step, float(layers), "layers/s", replace(options, runs=3)))
    except RuntimeError as error:
        result.notes.append(f"{name}: {str(error).splitlines()[0]}")


def _causal_kernels() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Name -> attention function that a dense causal model would call."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        found[f"SDPA, causal, {backend.name.lower()}"] = sdpa
    compiled = torch.compile(flex_attention, fullgraph=True)
    for block in (128, 64):
        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, _SHAPE.states, _SHAPE.states, device="cuda", BLOCK_SIZE=block)

        def flex(q: Tensor, k: Tensor, v: Tensor, mask: object = mask) -> Tensor:
            out: Tensor = compiled(q, k, v, block_mask=mask)
            return out

        found[f"FlexAttention, causal, blocks of {block}"] = flex
    return found
