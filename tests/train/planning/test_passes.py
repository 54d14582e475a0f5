"""Bytes that an update reads and writes outside of matrix products: the plan's formulas against those of real updates, operation by operation; and how parts of the time
add up. About 10 s."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from infra.world import World
from tests.support.ranks import run_in_ranks
from train.config import load_run
from train.machine.rates import DTYPES
from train.planning import estimate, flops, network, passes, states
from train.planning.demo_time_probe import dalle_update
from train.planning.estimate import Efficiency, Setting
from train.planning.hardware import GPUS, Gpu, parse_gpu
from train.planning.states import Cluster
from train.planning.update_times import Times

SMALL = (
    "tokenizer.vocab=600",
    "tokenizer.max_tokens=64",
    "dvae.vocab=300",
    "dalle.layers=4",
    "dalle.width=128",
    "dalle.heads=2",
    "dalle.conv_kernel=11",
    "dalle.attention=structured",
    "dalle_fit.accumulation=1",
    "dalle_fit.ema_every=25",
)
_PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
_OTHERS = ("allreduce_", "_reduce_scatter_base_", "broadcast_", "sqrt_", "linalg_vector_norm")
"""Messages, and what the optimizer's step does."""
_NOTHING = (
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "_unsafe_view",
    "alias",
    "_local_scalar_dense",
    "set_",
)
_WRITES = ("fill_", "zero_", "zeros", "zeros_like", "full", "ones_like", "arange")
_PICKS = ("embedding", "index_select", "gather", "scatter_add_", "embedding_dense_backward")


class _Moved(TorchDispatchMode):
    """Bytes that operations read and write: all of their arguments and results, but of picks only what is picked."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in (*_NOTHING, *_PRODUCTS, *_OTHERS):
            return out
        read, written = (sum(t.nbytes for t in tree_leaves(side) if isinstance(t, torch.Tensor)) for side in ((args, kwargs), out))
        if name == "copy_":
            read, written = args[1].nbytes, args[0].nbytes
        elif name in _WRITES:
            read = 0
        elif name in _PICKS:
            read = written = min(read, written)
        self.moved[name] += read + written
        return out


BATCHES = (4, 8)


def _counted(world: World, words: tuple[str, ...]) -> list[float]:
    found = []
    for batch in BATCHES:
        cfg = load_run("demo", [*words, f"dalle_fit.batch={batch}"])
        update = dalle_update(cfg, DTYPES[cfg.dalle_fit.precision], world)
        update()
        with _Moved() as moved:
            update()
        found.append(float(moved.moved.total()))
    return found


@pytest.mark.parametrize(
    ("least", "words"),
    [
        (0.93, ("dalle_fit.precision=fp32",)),
        (0.94, ("dalle_fit.precision=bf16",)),
        (0.93, ("dalle_fit.precision=bf16", "dalle_fit.logits=bf16", "zero.stage=1")),
        (0.87, ("dalle_fit.precision=bf16", "zero.stage=3")),  # biases are added in passes of their own there, on a CPU
        (0.92, ("dalle_fit.precision=bf16", "dalle_fit.activation_checkpointing=true")),
        (0.87, ("dalle_fit.precision=bf16", "dalle_fit.accumulation=2")),
    ],
)
def test_the_bytes_of_passes_are_nearly_all_of_an_update(least: float, words: tuple[str, ...]) -> None:
    (counted,) = run_in_ranks(_counted, 1, (*SMALL, *words))
    planned, apart, total = [], 0.0, 0
    for batch in BATCHES:
        setting = Setting.configured(load_run("demo", [*SMALL, *words, f"dalle_fit.batch={batch}"]), Cluster(1, 1))
        fit, parameters = setting.cfg.dalle_fit, states.count(setting.cfg.dalle, setting.cfg.stream_shape())
        run, recomputes = estimate.activation_run(setting), fit.activation_checkpointing
        planned.append(fit.accumulation * passes.of_activations(run, recomputes=recomputes))
        apart, total = passes.of_casts(run, parameters, forwards=1 + recomputes) + passes.of_gradients(parameters, setting.stage), parameters.total
        apart *= fit.accumulation
    more = counted[1] - counted[0]
    assert least <= (planned[1] - planned[0]) / more <= 1.07, "of activations, which grow with the batch"
    # Of parameters: the optimizer's copy for forward passes (8 bytes) is not among these, and embeddings' gradients, a large part of so small a model, are left out.
    rest = counted[0] - more * BATCHES[0] / (BATCHES[1] - BATCHES[0])
    assert 0.8 <= apart / (rest - 8 * total) <= 1.05


def test_what_an_engine_visits_is_no_less_than_masks_allow() -> None:
    cfg = load_run("1.2B", [])
    shape = cfg.stream_shape()
    allowed = flops.layer_pairs(cfg.dalle, shape)
    assert flops.visited_pairs(cfg.dalle, shape, "flex") == allowed < flops.visited_pairs(cfg.dalle, shape, "structured")
    assert flops.visited_pairs(cfg.dalle, shape, "dense") == 24 * 1280**2
    dense = flops.visited_flops(cfg.dalle, shape, "dense")
    assert dense - flops.forward_flops(cfg.dalle, shape) == 4.0 * 2048 * (24 * 1280**2 - allowed)


def test_products_in_fp32_have_a_rate_of_their_own_and_bf16_logits_avoid_it() -> None:
    gpu = GPUS["H100-80GB"]

    def compute(gpu: Gpu, *words: str) -> float:
        return estimate.times(Setting.configured(load_run("1.2B", list(words)), Cluster(4, 8)), gpu).compute

    fast = replace(gpu, tflops_fp32=gpu.tflops_16bit)
    heads = 4 * 32 * 2.0 * flops.head_products(load_run("1.2B", []).dalle, load_run("1.2B", []).stream_shape())
    slower = compute(gpu) - compute(fast)
    assert slower == pytest.approx(heads / 0.7e12 * (1 / 66.9 - 1 / 989.4))
    assert compute(gpu, "dalle_fit.logits=bf16") < compute(gpu) - 0.9 * slower
    assert compute(gpu, "dalle_fit.precision=fp32") > 8 * compute(gpu, "dalle_fit.logits=bf16")
    assert compute(replace(gpu, tflops_fp32=0.0)) == compute(replace(gpu, tflops_fp32=gpu.tflops_16bit / 16))


def test_a_description_may_say_more_than_a_datasheet_and_efficiencies_can_be_measured() -> None:
    given = parse_gpu("memory_gb=1,tflops_16bit=0.5,memory_gb_s=8,tflops_fp32=0.1,passes_gb_s=4,message_us=50")
    plain = parse_gpu("memory_gb=1,tflops_16bit=0.5,memory_gb_s=8,tflops_fp32=0.1")
    assert (given.fp32_rate, given.pass_rate, plain.pass_rate, plain.message_us) == (0.1, 4, 8, 0)
    setting = Setting.configured(load_run("demo", ["dalle_fit.precision=bf16"]), Cluster(1, 2))
    first, half = (estimate.times(setting, given, Efficiency(share, share)) for share in (1.0, 0.5))
    assert half.compute == pytest.approx(2 * first.compute) and half.latency == first.latency
    assert estimate.times(setting, plain, Efficiency(1.0, 1.0)).compute < first.compute
    # Two with figures, one bucket, and two groups that are gathered after the update.
    assert first.latency == pytest.approx(5 * 50e-6) and estimate.times(setting, plain).latency == 0


def test_messages_are_counted_by_buckets_and_by_parameters() -> None:
    found = states.Parameters(matrices=100, blocks_rest=0, embeddings=0, unembeddings=0, final_norm=0)
    assert network.messages(found, 7, 1, 30, 3, 2) == 2 + 4 + 2 and network.messages(found, 7, 2, 30, 3, 2) == 2 + 12 + 2
    assert network.messages(found, 7, 3, 30, 3, 2) == 2 + 3 * (4 + 14) and network.messages(found, 7, 3, 30, 3, 1) == 2


def test_gathers_after_the_update_are_never_hidden_and_nothing_is_without_overlap() -> None:
    parts = Times(compute=10.0, optimizer=1.0, inside=4.0, outside=3.0, gathering=2.0, latency=0.5)
    assert (parts.expected, parts.unhidden) == (13.5, 20.5) and replace(parts, overlaps=False).expected == 20.5
    assert replace(parts, is_exposed=True).expected == 16.5
    plain, overlapping = (
        estimate.times(Setting.configured(load_run("1.2B", [word]), Cluster(4, 8)), GPUS["H100-80GB"])
        for word in ("zero.overlap_comm=false", "run.seed=0")
    )
    assert plain.expected == plain.unhidden == overlapping.unhidden > overlapping.expected


def test_times_and_bills_scale_as_they_must() -> None:
    cfg, gpu = load_run("1.2B", []), GPUS["H100-80GB"]
    one, four = (Setting(cfg, Cluster(nodes, 8), 2, "flat") for nodes in (1, 4))
    seconds = [estimate.times(setting, gpu).compute for setting in (one, four)]
    # What weights and gradients take is the same on each GPU, however few samples it has.
    apart = sum(
        (
            passes.of_casts(estimate.activation_run(one), states.count(cfg.dalle, cfg.stream_shape()), forwards=2),
            passes.of_gradients(states.count(cfg.dalle, cfg.stream_shape()), 2),
        )
    ) / (gpu.memory_gb_s * 1e9 * estimate.LINK_EFFICIENCY)
    assert seconds[0] - apart == pytest.approx(4 * (seconds[1] - apart))
    slow = estimate.times(four, replace(gpu, network_gb_s=0.01))
    assert slow.expected == pytest.approx(slow.outside + slow.gathering + slow.optimizer) and slow.unhidden > slow.expected
    assert slow.gathering == pytest.approx(slow.outside / 2), "stage 2 all-reduces gradients, and gathers parameters"
    by_updates, by_tokens = estimate.bill(four, gpu, None), estimate.bill(four, gpu, 1024 * 1280 * 10.0)
    assert by_updates.updates == cfg.dalle_fit.steps and by_tokens.updates == 10
    assert by_updates.days == pytest.approx(cfg.dalle_fit.steps * estimate.times(four, gpu).expected / 86400)
    assert by_updates.megawatt_hours == pytest.approx(by_updates.gpu_hours * 700 * estimate.POWER_OVERHEAD / 1e6)
    plain = load_run("1.2B", ["dalle_fit.activation_checkpointing=false"])
    assert estimate.times(Setting(plain, Cluster(4, 8), 2, "flat"), gpu).compute < 0.8 * estimate.times(four, gpu).compute
