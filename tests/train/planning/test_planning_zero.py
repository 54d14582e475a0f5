"""The bytes that `plan` foretells are those of real runs: ZeRO 1, 2 and 3, fp16 storage, 16-bit moments, shards inside a node. Live tensor bytes, within 5 %.
About 60 s, most of it the start of processes."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from infra.world import World
from model.config import StreamShape, TransformerConfig
from tests.support.ranks import run_in_ranks
from train.bench.memory import build
from train.config import RunConfig, load_run
from train.machine.live_bytes import LiveBytes
from train.optimizer.adamw_cpu import CHUNK
from train.planning import activations, states
from train.planning.estimate import Memory, Setting
from train.planning.states import Cluster

SHAPE = StreamShape(text_tokens=32, text_vocab=300, grid=8, image_vocab=200)
CONFIG = TransformerConfig(layers=4, width=128, heads=4, attention="structured")
SAMPLES = 2
"""Of a micro-batch."""


@dataclass(frozen=True)
class Case:
    """One configuration."""

    stage: int
    precision: str = "fp32"
    weights: str = "auto"
    moments: str = "fp32"
    sharding: str = "flat"
    micro_batches: int = 1
    live: int = 1_000_000_000
    """zero.stage3_max_live_parameters."""

    def config(self, world: int) -> RunConfig:
        zero = {"stage": self.stage, "weights": self.weights, "sharding": self.sharding, "stage3_max_live_parameters": self.live}
        zero |= {
            "reduce_bucket_size": 100_000,
            "allgather_bucket_size": 100_000,
            "stage3_prefetch_bucket_size": 50_000,
            "stage3_max_reuse_distance": 100_000,
        }
        fit = {"precision": self.precision, "moments": self.moments, "accumulation": self.micro_batches, "ema_every": 1}
        fit |= {"batch": SAMPLES * world * self.micro_batches}
        overrides = [f"zero.{key}={value}" for key, value in zero.items()] + [f"dalle_fit.{key}={value}" for key, value in fit.items()]
        return load_run("12B", [*overrides, "zero.overlap_comm=false"])


FLAT = [
    Case(1, "fp16", "fp16", "16-bit", micro_batches=2),
    Case(2, micro_batches=2),
    Case(2, "fp16", "fp16", "16-bit"),
    Case(2, "fp16", "cast"),
    Case(3),
    Case(3, "bf16", micro_batches=2, live=100_000),
    Case(3, "fp16", "fp16", "16-bit", live=400_000),
]
NODE = [Case(2, sharding="node"), Case(3, "fp16", "fp16", "16-bit", sharding="node")]


def live_bytes(world: World, cases: list[Case]) -> list[dict[str, int]]:
    """Bytes of a rank from before the model is made: after an update, and at most in one; and of the average."""
    return [live_bytes_of(world, case) for case in cases]


def live_bytes_of(world: World, case: Case) -> dict[str, int]:
    from train.engines.zero.engine import ZeroEngine

    if case.sharding == "node":
        world = World(world.rank, world.size, world.rank % 2, 2)
    cfg = case.config(world.size)
    live = LiveBytes()
    with live:
        engine = ZeroEngine(build(CONFIG, SHAPE, "structured", case.precision, 1, "cpu"), cfg.dalle_fit, cfg.zero, world, cfg.scales)
        text_BT, lengths_B, codes_BI = torch.randint(300, (2, 32)), torch.tensor([32, 9]), torch.randint(200, (2, 64))
        for _ in range(3 if case.stage == 3 else 2):  # stage 3 learns in the first two what it fetches ahead in all others
            gc.collect()  # what made an update stands in cycles with what it made
            live.restart()
            for index in range(case.micro_batches):
                engine.micro_batch(last=index == case.micro_batches - 1)
                text_nll_BT, image_nll_BI = engine(text_BT, lengths_B, codes_BI)
                engine.backward((text_nll_BT.sum() + image_nll_BI.sum()) / 64)
                del text_nll_BT, image_nll_BI
            engine.step(1e-3)
    return {"after": live.now, "peak": live.peak, "average": sum(value.nbytes for value in engine.average.values.values())}


_STAGE_1_BELOW = 0.17
"""By how much the peak of stage 1 may lie below its formula, which adds all gradients to the widest activations; on a CPU, temporaries of the update hid that
until the update had none (0.161 seen, with fp16 weights and two micro-batches; the small bucket of fp16 gradients, which is fp32, is 0.013 of the formula)."""


def expected(case: Case, cluster: Cluster) -> tuple[float, float, float]:
    """Bytes after an update, at most in one, and of the average, by the formulas."""
    cfg = case.config(cluster.world)
    setting = Setting.configured(cfg, cluster)
    parameters = states.count(CONFIG, SHAPE)
    shards = cluster.shards(setting.layout)
    found = states.states(
        parameters,
        setting.stage,
        shards,
        storage=setting.storage,
        moment_bytes=setting.moment_bytes,
        half_gradients=setting.half_gradients,
        bucket_elements=cfg.zero.reduce_bucket_size,
        live_elements=states.gathered(CONFIG.width, cfg.zero.stage3_prefetch_bucket_size, cfg.zero.stage3_max_live_parameters),
        micro_batches=case.micro_batches,
    )
    half = case.precision != "fp32"
    run = activations.Run(CONFIG, SHAPE, SAMPLES, 2 if half else 4, "structured", 1, setting.storage == "cast", chunk_elements=1 << 21)
    average = 4 * parameters.total / shards
    resting = found.masters + found.moments + average
    if case.stage == 3:  # gradients' shards stay, and one bucket
        stored = (2 if setting.storage == "half" else 4) * parameters.matrices + 4 * parameters.rest
        resting += stored / shards + found.gradients + found.buckets / 2
    else:
        resting += found.parameters
    chunks = 3 * 4 * CHUNK  # what the update computes with, on a CPU alone
    widest = max(Memory(found, 0, activations.peak(run), 0.0).total + average, resting + (case.stage < 3) * found.gradients + chunks)
    return resting, widest, average


@pytest.mark.parametrize(("cases", "cluster"), [(FLAT, Cluster(1, 2)), (NODE, Cluster(2, 2))], ids=["2 processes", "2 nodes of 2 processes"])
def test_states_and_peaks_are_within_5_percent_of_live_bytes(cases: list[Case], cluster: Cluster) -> None:
    by_rank: list[list[dict[str, Any]]] = run_in_ranks(live_bytes, cluster.world, cases)
    wrong: list[str] = []
    for rank, found in enumerate(by_rank):
        for case, real in zip(cases, found, strict=True):
            resting, widest, average = expected(case, cluster)
            wrong += [
                f"rank {rank}, {case}: {name} {real[name] / 1e6:.2f} MB, by the formula {wanted / 1e6:.2f}"
                for name, wanted in (("average", average), ("after", resting), ("peak", widest))
                if not 1 - (_STAGE_1_BELOW if name == "peak" and case.stage == 1 else 0.05) < real[name] / wanted < 1.05
            ]
    assert not wrong, "\n".join(wrong)
