"""A toy transformer, its batches and its references: what the tests of ZeRO share."""

from __future__ import annotations

import dataclasses
import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infra.world import World
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer, parameter_tags
from tests.support.counts import global_sum
from train.config import DalleFit, ScaleSection, ZeroSection
from train.config_compression import CompressionSection

SHAPE = StreamShape(text_tokens=6, text_vocab=20, grid=3, image_vocab=11)
CONFIG = TransformerConfig(layers=2, width=16, heads=2, conv_kernel=3)
WITH_OPTIONS = dataclasses.replace(CONFIG, qk_norm=True, rotary_positions=True, base_width=4, base_heads=2)
BATCH = 24
LR = 1e-2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One configuration of the engine."""

    stage: int = 2
    precision: str = "fp32"
    weights: str = "auto"
    checkpointing: bool = False
    accumulation: int = 1
    sharding: str = "flat"
    moments: str = "fp32"
    offload: bool = False
    overlap: bool = False
    scope: str = "resblock"
    skip: str = "all"
    filter: bool = True
    initial: float = 13
    constant: float = 0
    options: bool = False
    """Whether the model has the options of the block."""
    optimizer: str = "paper"

    @property
    def config(self) -> TransformerConfig:
        return WITH_OPTIONS if self.options else CONFIG

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())


def fit_of(case: Case, **changes: Any) -> DalleFit:
    given = {"batch": BATCH, "accumulation": case.accumulation, "lr": LR, "ema": 0.5, "ema_every": 1, "steps": 6, "numerics_every": 2}
    return DalleFit(precision=case.precision, moments=case.moments, optimizer=case.optimizer, **(given | changes))  # type: ignore[arg-type]


def zero_of(case: Case) -> ZeroSection:
    return ZeroSection(
        stage=case.stage,  # type: ignore[arg-type]
        sharding=case.sharding,  # type: ignore[arg-type]
        weights=case.weights,  # type: ignore[arg-type]
        offload_optimizer=case.offload,
        overlap_comm=case.overlap,
    )


def scales_of(case: Case) -> ScaleSection:
    return ScaleSection(
        scope=case.scope,  # type: ignore[arg-type]
        skip=case.skip,  # type: ignore[arg-type]
        filter=case.filter,
        initial=case.initial,
        before_reduction=case.constant,
    )


def make_model(precision: str = "fp32", *, checkpointing: bool = False, seed: int = 0, config: TransformerConfig = CONFIG) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(config, SHAPE, branch_dtype=DTYPES[precision], checkpoint_every=int(checkpointing))


def make_engine(
    case: Case,
    world: World,
    *,
    seed: int = 0,
    device: str = "cpu",
    compression: CompressionSection | None = None,
    node: int = 2,
    **changes: Any,
) -> Any:
    """The engine of a case; with node-local sharding a node is two processes, or as many as ``node`` says."""
    from train.engines.zero.construction import sharded_construction
    from train.engines.zero.engine import ZeroEngine

    if case.sharding == "node":
        node = min(node, world.size)
        world = World(world.rank, world.size, world.rank % node, node)
    with sharded_construction(fit_of(case, **changes), zero_of(case), world):
        model = make_model(case.precision, checkpointing=case.checkpointing, seed=seed, config=case.config).to(device)
    return ZeroEngine(model, fit_of(case, **changes), zero_of(case), world, scales_of(case), compression)


def batch_of(step: int) -> dict[str, Tensor]:
    """The global batch of an update, with captions of unequal lengths."""
    generator = torch.Generator().manual_seed(step)
    return {
        "text": torch.randint(0, SHAPE.text_vocab, (BATCH, SHAPE.text_tokens), generator=generator),
        "lengths": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6] * 3).roll(step),
        "codes": torch.randint(0, SHAPE.image_vocab, (BATCH, SHAPE.image_tokens), generator=generator),
    }


def weighted(nll: tuple[Tensor, Tensor], text_count: float, image_count: float) -> Tensor:
    return nll[0].sum() / text_count / 8 + nll[1].sum() / image_count * 7 / 8


def backward(engine: Any, world: World, step: int, accumulation: int, loss_factor: float = 1.0) -> float:
    """Forward and backward passes of an update on this rank's rows; the global loss."""
    whole = {key: value.to(engine.device) for key, value in batch_of(step).items()}
    each = BATCH // (world.size * accumulation)
    micro = [{key: value[(world.rank + world.size * m) * each :][:each] for key, value in whole.items()} for m in range(accumulation)]
    count = global_sum({"text": sum(int(b["lengths"].sum()) for b in micro), "image": sum(b["codes"].numel() for b in micro)}, engine.device)
    total = torch.zeros((), device=engine.device)
    for m, b in enumerate(micro):
        engine.micro_batch(last=m == accumulation - 1)
        loss = weighted(engine(b["text"], b["lengths"], b["codes"]), count["text"], count["image"])
        total += loss.detach()
        engine.backward(loss * loss_factor)
    if world.size > 1:
        torch.distributed.all_reduce(total)
    return float(total)


def updates(engine: Any, world: World, start: int, stop: int, accumulation: int = 1) -> list[tuple[float, float, bool]]:
    """Loss, gradient norm and fate of updates."""
    out = []
    for step in range(start, stop):
        loss = backward(engine, world, step, accumulation)
        update = engine.step(LR)
        out.append((loss, update.grad_norm, update.applied))
    return out


def true_gradients(engine: Any) -> dict[str, Tensor]:
    """This rank's shard of the unscaled gradient of every parameter, in a zero tensor of the parameter's size: these sum to the gradient over ranks."""
    found = engine.gradients.read()
    factors = engine.factors()
    by_name = {piece.name: piece for piece in engine.pieces}
    out = {}
    for name, tensor in zip(engine.gradients.names, found.tensors, strict=True):
        piece, resblock = by_name[name], engine.tags[name].resblock
        whole = torch.zeros(piece.total)
        whole[piece.offset : piece.offset + piece.length] = tensor.float().cpu() * factors[-1 if resblock is None else resblock]
        out[name] = whole
    return out


def reference_gradients(step: int, *, half_weights: bool = False, config: TransformerConfig = CONFIG) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the whole batch in fp32, in one process; from the rounded matrices where those are stored in fp16."""
    model = make_model(config=config)
    if half_weights:
        tags = parameter_tags(model)
        for name, p in model.named_parameters():
            if tags[name].is_block_matrix:
                p.data = p.data.half().float()
    batch = batch_of(step)
    loss = weighted(model(batch["text"], batch["lengths"], batch["codes"]), float(batch["lengths"].sum()), float(batch["codes"].numel()))
    loss.backward()
    return loss.item(), {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}


def every_case() -> list[Case]:
    """The whole matrix: stage x precision and storage x checkpointing x accumulation."""
    kinds = [("fp32", "auto"), ("bf16", "auto"), ("fp16", "fp16"), ("fp16", "cast")]
    product = itertools.product((1, 2, 3), kinds, (False, True), (1, 2))
    return [Case(stage=s, precision=p, weights=w, checkpointing=c, accumulation=a) for s, (p, w), c, a in product]


def pairwise(cases: list[Case], keys: tuple[str, ...]) -> list[Case]:
    """A small selection in which every pair of values of two keys occurs: greedy, the same each time."""

    def pairs(case: Case) -> set[Any]:
        return {((a, getattr(case, a)), (b, getattr(case, b))) for a, b in itertools.combinations(keys, 2)}

    missing: set[Any] = set().union(*(pairs(case) for case in cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def some(cases: list[Case]) -> list[Case]:
    """All of them; the first alone where .ci/mutants.py, which runs them hundreds of times, asks for few."""
    return cases[:1] if os.environ.get("TESTS_QUICK") else cases


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Masters, moments and averages of this rank."""
    return {name: fragment.tensor.clone() for name, fragment in engine.fragments(to_load=True).items()}
