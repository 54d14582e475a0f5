"""``plan PRESET --check``: what the plan says of one rank, against what DeepSpeed's ZeRO and our engine do there, with nothing but shapes (``fake_world``).

Checked are: who shards with whom, batches, which elements the rank holds, the bytes of its states and at the widest point of an update, the bytes that it sends,
and a checkpoint's index. The other ranks' shards are computed by the arithmetic that this rank's were found equal to.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from infra.errors import ConfigError
from infra.world import World
from model.attention_engines import make_engine
from model.transformer import Transformer
from train.config_compression import CompressionSection
from train.engines.zero.construction import sharded_construction
from train.engines.zero.engine import ZeroEngine
from train.machine.rates import DTYPES
from train.planning import estimate, network, states
from train.planning.estimate import Setting
from train.planning.fake_world import Watched, fake_world
from train.planning.index_part import index_part
from train.planning.wire import Fragment
from train.run.inputs import logits_dtype
from train.weights import layout
from train.weights.checkpoint_index import index_of

TOLERANCE = 0.05
"""Of bytes of memory. What is sent and who holds what must be equal."""
_SENT = 0.001
"""Of bytes sent: padding of shards, which the plan leaves out."""


@dataclass(frozen=True)
class Finding:
    """One figure of the plan beside the engine's."""

    what: str
    planned: float
    found: float
    unit: str = ""
    tolerance: float = 0.0
    """By which share of the plan they may differ."""
    below: float = 0.0
    """By which share of the plan the engine may stay below it, beyond that."""

    @property
    def is_right(self) -> bool:
        """Whether they are as close as they have to be."""
        low, high = 1 - self.tolerance - self.below, 1 + self.tolerance
        return low * self.planned <= self.found <= high * self.planned

    @property
    def apart(self) -> float:
        """By which share of the plan they differ; 0 if nothing was planned."""
        return self.found / self.planned - 1 if self.planned else 0.0

    @property
    def line(self) -> str:
        """For people."""
        scale, digits = (1e9, 3) if self.unit == "GB" else (1e6, 2) if self.unit == "MB" else (1, 0)
        apart = f"{self.apart:+.2%}" if self.planned else "" if self.found == self.planned else "not 0"
        values = f"{self.planned / scale:15,.{digits}f}{self.found / scale:15,.{digits}f} {self.unit:3}{apart:>9}"
        return f"{self.what:50}{values}{'' if self.is_right else '   WRONG'}"


MOST_INDEX = 10_000_000
"""Bytes of a checkpoint's index that a rank may have to read before it can restore."""
_BELOW = 0.12
"""Beyond that, on stages 1 and 2: the plan adds the gradients of all parameters to the widest activations, which may come before most gradients are there."""


def findings(setting: Setting) -> list[Finding]:
    """Run two updates of rank 0 and compare. Gradients are summed exactly between machines: what compression sends is counted in real runs
    (tests/train/planning/test_planning_compression.py).

    Raises:
        ConfigError: the batch cannot be divided evenly, or the update is not ours (zero.offload_optimizer, dalle_fit.optimizer = "apex").
    """
    fit = setting.cfg.dalle_fit
    if setting.cfg.zero.offload_optimizer or fit.optimizer == "apex":
        raise ConfigError("--check follows the update of this project on a GPU: set zero.offload_optimizer=false and dalle_fit.optimizer=paper.")
    cfg = setting.cfg
    # FlexAttention needs a compiler for its device; the plan knows the activations of this engine too.
    changed: dict[str, Any] = {"dalle": replace(cfg.dalle, attention="structured"), "compression": CompressionSection()}
    if fit.precision == "auto":  # decided on the machine that trains; the plan counts what it stores in 16 bits there
        changed["dalle_fit"] = fit.model_copy(update={"precision": "bf16"})
    setting = replace(setting, cfg=cfg.model_copy(update=changed), rank=None)
    with fake_world(setting.cluster.nodes, setting.cluster.gpus) as (world, watched):
        engine = build(setting, world)
        by_rank = estimate.fragments(setting)
        found = [*_places(setting, engine, by_rank[0]), *_checkpoint(setting, engine, by_rank)]
        update(setting, engine)  # stage 3 learns in the first update what it fetches ahead in all others, and moments are made in it
        gc.collect()
        watched.restart()
        update(setting, engine)
        return [*found, *_bytes(setting, engine, watched)]


def build(setting: Setting, world: World) -> ZeroEngine:
    """The engine of a rank."""
    cfg, fit = setting.cfg, setting.cfg.dalle_fit
    shape = cfg.stream_shape()
    with sharded_construction(fit, cfg.zero, world):
        attend = make_engine("structured", cfg.dalle, shape, torch.device("cpu"))
        every = fit.checkpoint_every if fit.activation_checkpointing else 0
        dtype = DTYPES[fit.precision]
        model = Transformer(cfg.dalle, shape, branch_dtype=dtype, attend=attend, checkpoint_every=every, logits_dtype=logits_dtype(fit, dtype))
    model.to = lambda *_: model  # type: ignore[method-assign, assignment]  # it is there already, and fake tensors cannot be swapped
    return ZeroEngine(model, fit, cfg.zero, world, cfg.scales, cfg.compression, cfg.run.seed)


def update(setting: Setting, engine: ZeroEngine) -> None:
    """One update, of all its micro-batches."""
    shape, parts = setting.cfg.stream_shape(), setting.cfg.dalle_fit.accumulation
    text_BT = torch.zeros((setting.micro_batch, shape.text_tokens), dtype=torch.int64)
    lengths_B = torch.zeros(setting.micro_batch, dtype=torch.int64)
    codes_BI = torch.zeros((setting.micro_batch, shape.image_tokens), dtype=torch.int64)
    if setting.cfg.dalle_fit.contrasts:  # as train/stages/dalle_contrast.py does
        text_BT, lengths_B, codes_BI = (torch.cat([given, given]) for given in (text_BT, lengths_B, codes_BI))
        with torch.no_grad(), engine.frozen(evaluates=False):
            for _ in range(parts):
                engine(text_BT, lengths_B, codes_BI)
    for index in range(parts):
        engine.micro_batch(last=index == parts - 1)
        text_nll_BT, image_nll_BI = engine(text_BT, lengths_B, codes_BI)
        engine.backward(text_nll_BT.sum() + image_nll_BI.sum())
        del text_nll_BT, image_nll_BI
    engine.step(1e-3, [0.0] * len(engine.measure()))
    engine.average.wait()  # its thread computes with fake tensors too, and their mode is not made for two threads


def _places(setting: Setting, engine: ZeroEngine, fragments: list[Fragment]) -> Iterator[Finding]:
    """Who shards with whom, batches, and what this rank holds."""
    cluster, topology = setting.cluster, engine.topology
    if topology is not None:
        within, between = (dist.get_process_group_ranks(group) for group in (topology.within, topology.between))
        yield Finding("ranks that shard together, not as planned", 0, len(set(within) ^ set(range(cluster.gpus))))
        yield Finding("ranks with the same shard, not as planned", 0, len(set(between) ^ set(range(0, cluster.world, cluster.gpus))))
    yield Finding("samples of a micro-batch of a rank", setting.micro_batch, engine.config["train_micro_batch_size_per_gpu"])
    sharding = cluster.world if topology is None else cluster.gpus
    product = engine.config["train_micro_batch_size_per_gpu"] * engine.config["gradient_accumulation_steps"] * sharding
    yield Finding("samples of the ranks that shard together", engine.config["train_batch_size"], product)
    planned = {(f.parameter.name, f.offset, f.length) for f in fragments}
    held = {(piece.name, piece.offset, piece.length) for piece in engine.pieces}
    yield Finding("pieces of parameters that rank 0 holds", len(planned), len(held))
    yield Finding("of them planned or held otherwise", 0, len(planned ^ held))


def _checkpoint(setting: Setting, engine: ZeroEngine, cut: list[list[Fragment]]) -> Iterator[Finding]:
    """The tensors of a checkpoint, and the bytes of its index and of the largest part: against what a rank should have to read."""
    real = layout.held(engine.fragments(to_load=False))
    by_rank, frozen = [], ["frozen"] if setting.cfg.dalle_fit.contrasts else []
    states_of = {kind: engine.shard_optimizer.state_names({"orthogonal": kind and setting.orthogonal}) for kind in (False, True)}
    for fragments in cut:
        rows = {}
        for fragment in fragments:
            for state in ("model", "average", *frozen, *(f"optimizer/{name}" for name in states_of[fragment.parameter.is_block_matrix])):
                name = f"{state}/{fragment.parameter.name}"
                dtype = "int16" if setting.moment_bytes == 4 and fragment.parameter.is_block_matrix and "optimizer" in state else "float32"
                rows[name] = (fragment.offset, fragment.length, layout.kind_of(fragment.parameter.elements, dtype))
        by_rank.append(dict(sorted(rows.items())))
    yield Finding("tensors of a checkpoint held otherwise", 0, len(set(real.items()) ^ set(by_rank[0].items())))
    expected = layout.Expected(layout.Expected.of(by_rank[0]))
    tensors = layout.described(expected, [expected.differences(rows, rank) for rank, rows in enumerate(by_rank)])
    elements = sum(tensor["size"] for tensor in tensors.values())
    parameters = states.count(setting.cfg.dalle, setting.cfg.stream_shape())
    planned = (2 + len(frozen)) * parameters.total + len(states_of[True]) * parameters.matrices + len(states_of[False]) * parameters.rest
    yield Finding("elements of a checkpoint without buffers", planned, elements)
    parts = [len(index_part(rank, rows)) for rank, rows in enumerate(by_rank)]
    index = len(json.dumps(index_of(tensors, [(size, bytes(32)) for size in parts])).encode())
    yield Finding("index and own part that a rank reads, at most", MOST_INDEX, index + max(parts), "MB", below=1.0)


def _bytes(setting: Setting, engine: ZeroEngine, watched: Watched) -> Iterator[Finding]:
    """Memory and messages of the update that was watched."""
    cfg, memory = setting.cfg, estimate.memory(setting)
    held = engine.fragments(to_load=True)
    kinds = ("model", "optimizer", "average", "frozen")
    shares = {kind: sum(f.tensor.nbytes for name, f in held.items() if name.startswith(f"{kind}/")) for kind in kinds}
    yield Finding("masters", memory.states.masters, shares["model"], "GB", TOLERANCE)
    yield Finding("moments", memory.states.moments, shares["optimizer"], "GB", TOLERANCE)
    shards = setting.cluster.shards(setting.layout)
    parameters = states.count(cfg.dalle, cfg.stream_shape()).total
    yield Finding("frozen weights, in CPU memory", estimate.frozen(setting), shares["frozen"], "GB", TOLERANCE)
    yield Finding("average, in CPU memory", 4 * parameters / shards, shares["average"], "GB", TOLERANCE)
    loose = 0.0 if setting.stage == 3 else _BELOW
    yield Finding(
        "widest point of an update, with what hosts keep",
        memory.training + shares["average"] + shares["frozen"],
        watched.peak,
        "GB",
        TOLERANCE,
        below=loose,
    )
    traffic, most, own = estimate.traffic(setting), estimate.exchanged(setting), estimate.exchanged(setting, 0)
    traffic = network.Traffic(traffic.inside - most.inside + own.inside, traffic.outside - most.outside + own.outside)  # of this rank
    # Stage 3 need not gather again in the backward pass what it has kept since the forward pass; the plan has no formula for how much that is.
    kept = 4 * (cfg.zero.stage3_max_live_parameters + cfg.zero.stage3_max_reuse_distance) if setting.stage == 3 else 0
    below = min(1.0, kept / traffic.inside) if traffic.inside else 0.0  # one process sends nothing
    yield Finding("sent in an update, inside the machine", traffic.inside, watched.inside, "MB", _SENT, below)
    yield Finding("sent in an update, to other machines", traffic.outside, watched.outside, "MB", _SENT, below if setting.layout == "flat" else 0.0)
