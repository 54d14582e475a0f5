"""What is measured of Muon on ZeRO's shards in several processes; tests/train/engines/test_zero_muon.py judges it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from infra.world import World
from model.config import TransformerConfig
from model.transformer import parameter_tags
from tests.train.engines.zero_cases import (
    CONFIG,
    LR,
    SHAPE,
    Case,
    batch_of,
    everything,
    fit_of,
    make_engine,
    make_model,
    some,
    updates,
    weighted,
    zero_of,
)
from tests.train.engines.zero_checkpoints import gathered, meta_of, restore
from tests.train.engines.zero_compression_runs import LOW, replicas_agree
from tests.train.engines.zero_runs import inject
from train.config import RunConfig
from train.config_compression import CompressionSection
from train.optimizer.muon_schedule import Load
from train.planning import estimate
from train.planning.estimate import Setting
from train.planning.states import Cluster
from train.weights import checkpoint

KINDS = ("model", "average", "optimizer/exp_avg", "optimizer/exp_avg_sq", "optimizer/momentum")
UPDATES = 3
COMPARED = some([Case(stage=stage, accumulation=a, optimizer="muon") for stage, a in ((1, 2), (2, 1), (3, 1))])
HALVES = some([Case(stage=2, precision="fp16", optimizer="muon"), Case(stage=3, precision="fp16", moments="16-bit", optimizer="muon")])
REPLICAS = [
    (Case(stage=3, precision="fp16", sharding="node", moments="16-bit", optimizer="muon"), LOW.model_copy(update={"wire": "1-6-9"})),
    (Case(stage=2, sharding="node", optimizer="muon"), LOW),
    (Case(stage=1, precision="bf16", sharding="node", optimizer="muon"), CompressionSection()),
    (Case(stage=3, precision="fp16", sharding="node", optimizer="muon"), CompressionSection()),
]
SKIPPED = Case(stage=3, precision="fp16", skip="resblock", optimizer="muon")
SAVED = Case(stage=2, precision="fp16", moments="16-bit", optimizer="muon")


def orthogonal(direction: Tensor) -> Tensor:
    """The update of a whole matrix in float64, by its singular values."""
    u, s, vh = torch.linalg.svd(direction.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return 0.2 * math.sqrt(max(direction.shape)) * (u @ torch.diag(s) @ vh)


@cache
def reference(optimizer: str = "muon", config: TransformerConfig = CONFIG) -> dict[str, Tensor]:
    """Weights after some updates of whole matrices in one process, in float64 but for the model's products."""
    model = make_model(config=config)
    tags, fit = parameter_tags(model), fit_of(COMPARED[0], clip_norm=CLIP)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    state = {name: [torch.zeros_like(value), torch.zeros_like(value)] for name, value in weights.items()}
    for step in range(UPDATES):
        batch = batch_of(step)
        model.zero_grad()
        weighted(model(batch["text"], batch["lengths"], batch["codes"]), float(batch["lengths"].sum()), float(batch["codes"].numel())).backward()
        grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
        for name, p in model.named_parameters():
            grad = grads[name] * min(1.0, CLIP / (norm + 1e-6))
            mean, square = state[name]
            decayed = weights[name] * (1 - LR * fit.weight_decay * tags[name].decays)
            is_orthogonal = optimizer == "muon" and tags[name].is_block_matrix
            lr = LR * tags[name].ratios.step(orthogonal=is_orthogonal)
            if is_orthogonal:
                mean.mul_(0.95).add_(grad, alpha=0.05)
                weights[name] = decayed - lr * orthogonal(0.95 * mean + 0.05 * grad)
            else:
                mean.mul_(0.9).add_(grad, alpha=0.1)
                square.mul_(0.96).add_(grad.square(), alpha=0.04)
                root = (square / (1 - 0.96 ** (step + 1))).sqrt() + 1e-8
                weights[name] = decayed - lr * mean / (1 - 0.9 ** (step + 1)) / root
            p.data.copy_(weights[name])
    return {name: value.flatten() for name, value in weights.items()}


CLIP = 0.25
"""Small enough to clip."""


@contextmanager
def counted(world: World) -> Iterator[list[int]]:
    """Bytes that Muon sends to each other rank inside the block, as the collective gets them."""
    found = [0] * world.size
    plain = dist.all_to_all_single

    def counting(into: Tensor, message: Tensor, back: list[int], out: list[int], **named: Any) -> Any:
        assert into.nbytes == sum(back) and message.nbytes == sum(out)
        for rank, size in enumerate(out):
            found[rank] += size * (rank != world.rank)
        return plain(into, message, back, out, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counting)
        yield found


def planned(world: World, case: Case, section: CompressionSection | None = None) -> Load:
    """What one update takes on this rank, as ``plan`` foretells it; by node, a machine is two processes."""
    cfg = RunConfig(dalle=case.config, dalle_fit=fit_of(case), zero=zero_of(case), compression=section or CompressionSection())
    object.__setattr__(cfg, "stream_shape", lambda: SHAPE)
    cluster = Cluster(world.size // 2, 2) if case.sharding == "node" else Cluster(1, world.size)
    found = estimate.orthogonalising(Setting.configured(cfg, cluster))
    return found[world.rank % len(found)]


def compared(world: World, case: Case) -> dict[str, Any]:
    """How far this engine's weights lie from the reference's; whether a shard ends inside a matrix; what was sent, also in an update that is skipped."""
    engine = make_engine(case, world, clip_norm=CLIP)
    with counted(world) as sent:
        history = updates(engine, world, 0, UPDATES, case.accumulation)
    found, wanted = gathered(engine, ("model",)), reference(case.optimizer, case.config)
    matrices = {name for name, tag in engine.tags.items() if tag.is_block_matrix}
    apart = {name: float((found[f"model/{name}"] - value).norm() / value.norm()) for name, value in wanted.items()}
    state = everything(engine).keys()
    engine.module.final_norm.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    with counted(world) as idle:
        ((*_, applied),) = updates(engine, world, UPDATES, UPDATES + 1, case.accumulation)
    return {
        "matrices": max(apart[name] for name in matrices),
        # The gradient of a key's bias is rounding alone, because it adds the same to all scores of a query; AdamW makes steps of it.
        "others": max(value for name, value in apart.items() if name not in matrices and not name.endswith(".k.bias")),
        "clipped": all(norm > CLIP for _, norm, _ in history),
        "applied": [one[2] for one in history] + [applied],
        "cut": any(piece.name in matrices and piece.offset > 0 for piece in engine.pieces),
        "state": {(name.split("/")[1], name.split("/")[2] in matrices) for name in state if name.startswith("optimizer/")},
        "sent": [size / UPDATES for size in sent],
        "planned": list(planned(world, case).sent) if case.optimizer == "muon" else [],
        "idle": sum(idle),
    }


def replicas(world: World, case: Case, section: CompressionSection) -> dict[str, Any]:
    """Whether machines stay equal bit for bit, and how the loss goes."""
    engine = make_engine(case, world, compression=section)
    history, agree, sent = [], [], 0
    plain = dist.broadcast

    def counting(tensor: Tensor, *given: Any, **named: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes * (named.get("group") is engine.topology.between)
        return plain(tensor, *given, **named)

    for step in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "broadcast", counting)
            history += updates(engine, world, step, step + 1, case.accumulation)
        agree.append(replicas_agree(engine))
    return {
        "agree": all(agree),
        "losses": [loss for loss, *_ in history],
        "compressed": engine.compression is not None,
        "between": sent / 3 * (engine.nodes - 1) / engine.nodes,
        "planned": planned(world, case, section).between,
    }


def saved(world: World, folder: str) -> dict[str, Any]:
    """Three updates, a checkpoint, two more; the same two after a restore."""
    engine, url = make_engine(SAVED, world), f"{folder}/muon"
    updates(engine, world, 0, 3)
    checkpoint.save(url, 3, engine.fragments(to_load=False), meta_of(engine), world, keep=2)
    whole = gathered(engine, KINDS)
    losses = [loss for loss, *_ in updates(engine, world, 3, 5)]
    again = make_engine(SAVED, world, seed=99)
    restore(again, url, world)
    return {"whole": whole, "losses": losses, "again": [loss for loss, *_ in updates(again, world, 3, 5)]}


def loaded(world: World, folder: str, stage: int, weights: str) -> dict[str, Any]:
    """What another number of ranks reads on another stage."""
    engine = make_engine(Case(stage=stage, precision="fp16", weights=weights, moments="16-bit", optimizer="muon"), world, seed=99)
    restore(engine, f"{folder}/muon", world)
    return {"whole": gathered(engine, KINDS), "losses": [loss for loss, *_ in updates(engine, world, 3, 5)]}


def losses(world: World, case: Case) -> dict[str, Any]:
    """Losses of some updates, and what one of them sent, as counted and as planned."""
    engine = make_engine(case, world)
    with counted(world) as sent:
        found = [loss for loss, *_ in updates(engine, world, 0, 4, case.accumulation)]
    return {"losses": found, "sent": [size / 4 for size in sent], "planned": list(planned(world, case).sent)}


def on_four(world: World, folder: str) -> dict[str, Any]:
    return {
        "compared": {str(case): compared(world, case) for case in COMPARED},
        "halves": {str(case): losses(world, case) for case in HALVES},
        "replicas": [replicas(world, case, section) for case, section in REPLICAS],
        "skipped": inject(world, SKIPPED),
        "saved": saved(world, folder),
    }


def on_two(world: World, folder: str) -> dict[str, Any]:
    return {"compared": {str(case): compared(world, case) for case in COMPARED}, "loaded": loaded(world, folder, 3, "fp16")}


def on_one(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"compared": {str(case): compared(world, case) for case in COMPARED}, "loaded": loaded(world, folder, 1, "cast")}
    return found | {"halves": {str(case): losses(world, case) for case in [Case(optimizer="muon"), *HALVES]}}
