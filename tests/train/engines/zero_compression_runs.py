"""What is measured of compression between machines in several processes; tests/train/engines/test_zero_compression.py judges it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import ConfigError
from infra.world import World
from tests.train.engines.zero_cases import SHAPE, Case, backward, everything, make_engine, some, updates
from tests.train.engines.zero_checkpoints import gathered, meta_of, restore
from train.config_compression import CompressionSection
from train.engines.zero.compression import fragments
from train.engines.zero.compression.buffers import decoded
from train.engines.zero.compression.fragments import payload_bytes, sent_bytes
from train.planning import wire
from train.weights import checkpoint

LOW = CompressionSection(method="powersgd", rank=4, wire="fp32")
FULL = LOW.model_copy(update={"rank": 2000})
EXACT = CompressionSection()
CASES = some(
    [
        Case(stage=3, precision="fp16", sharding="node", moments="16-bit"),
        Case(stage=1, sharding="node", accumulation=2),
        Case(stage=2, precision="fp16", sharding="node", checkpointing=True),
        Case(stage=2, precision="fp16", sharding="node", offload=True, options=True),
    ]
)
SECTIONS = [LOW, LOW.model_copy(update={"wire": "bf16", "refresh_every": 3}), LOW.model_copy(update={"wire": "1-6-9", "rest": "1-6-9"})]
SKIPS = some([Case(stage=3, precision="fp16", sharding="node"), Case(stage=2, precision="fp16", sharding="node", skip="resblock")])
KEPT = [
    LOW.model_copy(update={"wire": "1-6-9", "refresh_every": 4}),
    LOW.model_copy(update={"rest": "1-6-9"}),
    LOW.model_copy(update={"error_buffers": "sum"}),
]
SAVED = Case(stage=3, precision="fp16", sharding="node")


def owed(engine: Any, *, of_all: bool = True) -> dict[str, Tensor]:
    """What the errors of all machines sum to, whole and in true units; or what they are on this rank."""
    out = {}
    for name, tensor in sorted((engine.compression.buffers.tensors if engine.compression is not None else {}).items()):
        out[name] = decoded(tensor).double().clone()
    if not of_all:
        return out
    pieces = {piece.name: piece for piece in engine.pieces}
    whole = {}
    for name, tag in engine.tags.items():
        if tag.is_block_matrix:
            total = max(piece.total for piece in engine.pieces if piece.name == name) if name in pieces else 0
            size = torch.tensor(total)
            dist.all_reduce(size, op=dist.ReduceOp.MAX)
            whole[name] = torch.zeros(int(size), dtype=torch.float64)
            if name in out:
                whole[name][pieces[name].offset :][: pieces[name].length] = out[name]
            dist.all_reduce(whole[name])
    return whole


def replicas_agree(engine: Any) -> bool:
    """Whether masters, moments and averages are those of the other machine, bit for bit."""
    agree = True
    for _, tensor in sorted(everything(engine).items()):
        mine = tensor.contiguous().view(torch.uint8)  # gloo knows no int16
        parts = [torch.empty_like(mine) for _ in range(engine.nodes)]
        dist.all_gather(parts, mine, group=engine.topology.between)
        agree &= all(torch.equal(part, parts[0]) for part in parts)
    flags = [None] * engine.world.size
    dist.all_gather_object(flags, bool(agree))
    return all(flags)


def full_rank(world: World, case: Case) -> dict[str, float]:
    """Three updates with factors of full rank, beside exact ones: the largest relative difference of losses, norms, and of the first mean moment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "is_worthwhile", lambda block: True)
        ends = []
        for section in (EXACT, FULL):
            engine = make_engine(case, world, compression=section)
            first = updates(engine, world, 0, 1, case.accumulation)
            moments = gathered(engine, ("optimizer/exp_avg",)) if case.moments == "fp32" else {}
            ends.append((first + updates(engine, world, 1, 3, case.accumulation), moments))
    (plain, exact), (compressed, found) = ends
    size = sum(float(value.square().sum()) for value in exact.values()) or 1.0
    error = sum(float((value - found[name]).square().sum()) for name, value in exact.items())
    return {
        "loss": max(abs(a[0] / b[0] - 1) for a, b in zip(compressed, plain, strict=True)),
        "norm": max(abs(a[1] / b[1] - 1) for a, b in zip(compressed, plain, strict=True)),
        "moment": (error / size) ** 0.5,
    }


def low_rank(world: World, case: Case, section: CompressionSection) -> dict[str, Any]:
    """Six updates: whether replicas agree after each, what sum(E) loses is what is applied, and the bytes counted are those of the fragments."""
    engine = make_engine(case, world, compression=section)
    agree, worst, counted, norms, watched = [], 0.0, [], [], []
    for step in range(6):
        seen: dict[str, Any] = {}
        before = owed(engine)
        backward(engine, world, step, case.accumulation)
        given = true_sums(engine)
        plain = engine._engine.step
        engine._engine.step = lambda plain=plain, seen=seen: (seen.update(true_sums(engine, divide=engine.nodes)), plain())
        factors = engine.factors()
        engine.factors = lambda factors=factors: factors
        update = engine.step(1e-2)
        del engine.factors
        engine._engine.step = plain
        assert update.applied
        watched.append((update.numerics, owed_over_asked(engine, before, given)))
        after = owed(engine)
        for name, value in after.items():
            balance = before[name] + given[name] - seen[name] - value
            worst = max(worst, float(balance.norm() / (before[name] + given[name]).norm()))
        norm = sum(float(value.square().sum()) for value in seen.values()) ** 0.5
        norms.append(abs(update.grad_norm / norm - 1))
        agree.append(replicas_agree(engine))
        counted.append(engine.compression.wire.sent)
    blocks = [member.block for member in engine.compression.members if member.block is not None]
    exact = sum(piece.length for piece in engine.pieces) - sum(block.elements for block in blocks)
    size = {"p": sum(b.rank * min(b.rows, b.width) for b in blocks), "q": sum(b.rank * max(b.rows, b.width) for b in blocks)}
    expected = sum(payload_bytes(size[factor], section.wire, engine.nodes) for factor in ("p", "q")) + 4 * exact
    whole = 4 * sum(block.elements for block in blocks)
    every = section.refresh_every
    wanted = [sent_bytes(expected + (whole if every and step % every == 0 else 0), engine.nodes) for step in range(6)]
    planned = planned_bytes(engine, case, section)
    return {
        "plan": planned["bytes"] == counted,
        "plan's fragments": planned["fragments"],
        "agree": agree,
        "balance": worst,
        "norm": max(norms),
        "counted": counted == wanted,
        "compressed": len(blocks),
        "owed": float(sum(v.norm() for v in after.values())),
        "sent": counted,
        "watched": watched,
    }


def owed_over_asked(engine: Any, errors: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, float]:
    """The norm of what is owed over that of the gradient, of the compressed rows of each resblock and of all, by whole sums."""
    pieces = {piece.name: piece for piece in engine.pieces}
    members = {member.name: member for member in engine.compression.members}
    squares: dict[str, list[float]] = {}
    for name, error in errors.items():
        picked = torch.zeros(len(error))
        if name in members and (block := members[name].block) is not None:
            picked[pieces[name].offset + block.start :][: block.elements] = 1
        dist.all_reduce(picked, op=dist.ReduceOp.MAX)
        slot = engine.tags[name].resblock
        for key in (engine._names()[slot], "in all"):
            one = squares.setdefault(key, [0.0, 0.0])
            one[0] += float((error * picked).square().sum())
            one[1] += float((gradients[name] * picked).square().sum())
    return {key: (owed / asked) ** 0.5 for key, (owed, asked) in squares.items()}


def planned_bytes(engine: Any, case: Case, section: CompressionSection) -> dict[str, Any]:
    """What ``plan`` says of this rank: bytes of six updates, and whether its fragments are those of the engine."""
    every = section.refresh_every
    flags = {"by_resblock": engine.scales is not None, "half": case.precision == "fp16", "packed": case.moments == "16-bit"}
    held = wire.fragments(list(wire.parameters(case.config, SHAPE)), case.stage, 2, **flags)[engine.topology.local]
    sent = wire.sent(held, section.rank, section.wire, engine.nodes, every)
    mine = {(piece.name, piece.offset, piece.length) for piece in engine.pieces}
    bytes_ = [sent.factors + sent.exact + (sent.refresh * every if every and step % every == 0 else 0) for step in range(6)]
    return {"bytes": bytes_, "fragments": {(one.parameter.name, one.offset, one.length) for one in held} == mine}


def true_sums(engine: Any, divide: int = 1) -> dict[str, Tensor]:
    """The true gradients in the shards, summed over all ranks and divided by how often each is there."""
    found = engine.gradients.read()
    factors = engine.factors()
    pieces = {piece.name: piece for piece in engine.pieces}
    by_name = dict(zip(engine.gradients.names, found.tensors, strict=True))
    out = {}
    for name, tag in sorted(engine.tags.items()):
        parameter = engine.module.get_parameter(name)
        whole = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), dtype=torch.float64)
        if name in by_name:
            factor = factors[-1 if tag.resblock is None else tag.resblock]
            whole[pieces[name].offset :][: pieces[name].length] = by_name[name].double().cpu() * factor
        dist.all_reduce(whole)
        out[name] = whole / divide
    return out


def infinite(world: World, case: Case) -> dict[str, Any]:
    """An Inf in a gradient of resblock 1 on the last rank: what becomes of weights and errors, on this rank."""
    engine = make_engine(case, world, compression=LOW)
    updates(engine, world, 0, 2)
    before, errors = everything(engine), owed(engine, of_all=False)
    matrix = engine.module.resblocks[1].mlp_1.weight
    hook = matrix.register_hook(lambda grad: torch.full_like(grad, float("inf")) if world.rank == world.size - 1 else grad)
    (poisoned,) = updates(engine, world, 2, 3)
    hook.remove()
    after, later = everything(engine), owed(engine, of_all=False)
    moved = sorted(name for name, value in after.items() if not torch.equal(value, before[name]))
    taken_in = sorted(name for name, value in later.items() if not torch.equal(value, errors[name]))
    finite = all(bool(value.isfinite().all()) for value in later.values())
    history = updates(engine, world, 3, 8)
    return {
        "applied": poisoned[2],
        "moved": moved,
        "taken in": taken_in,
        "held": sorted(later),
        "finite": finite,
        "history": history,
        "agree": replicas_agree(engine),
    }


def contaminated(world: World) -> dict[str, Any]:
    """An error that is not finite on the last rank skips the update, becomes zero there, and no other does."""
    engine = make_engine(SAVED, world, compression=LOW)
    updates(engine, world, 0, 2)
    name = "resblocks.1.mlp_1.weight"
    if world.rank == world.size - 1:
        engine.compression.buffers.tensors[name][3] = float("inf")
    (skipped,) = updates(engine, world, 2, 3)
    found = {"applied": skipped[2], "zero": [key for key, value in owed(engine, of_all=False).items() if not value.any()]}
    return found | {"later": updates(engine, world, 3, 6)}


def resumed(world: World, folder: str) -> list[dict[str, Any]]:
    """A checkpoint after five updates, and four more; the same from the checkpoint."""
    out = []
    for index, section in enumerate(KEPT):
        engine, url = make_engine(SAVED, world, compression=section), f"{folder}/kept-{index}"
        updates(engine, world, 0, 5)
        checkpoint.save(url, 5, engine.fragments(to_load=False), meta_of(engine), world, keep=1)
        found: dict[str, Any] = {"owed": owed(engine)}
        found["on"] = updates(engine, world, 5, 9)
        found["end"] = everything(engine) | owed(engine, of_all=False)
        again = make_engine(SAVED, world, seed=99, compression=section)
        restore(again, url, world)
        found["owed again"] = owed(again)
        found["again"] = updates(again, world, 5, 9)
        same = everything(again) | owed(again, of_all=False)
        found["same"] = all(torch.equal(value, same[name]) for name, value in found.pop("end").items())
        out.append(found)
    return out


def elsewhere(world: World, url: str, case: Case, section: CompressionSection, node: int) -> dict[str, Any]:
    """A checkpoint's errors in a run of another shape: what is owed after the restore, what an update applies beyond its gradient, and what is owed then."""
    said: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("train.engines.zero.compression")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    engine = make_engine(case, world, seed=99, compression=section, node=node)
    restore(engine, url, world)
    log.removeHandler(handler)
    found: dict[str, Any] = {"owed": owed(engine), "said": said, "active": engine.compression is not None and engine.compression.is_active}
    backward(engine, world, 5, 1)
    given, seen = true_sums(engine), {}
    plain, factors = engine._engine.step, engine.factors()
    engine.factors = lambda: factors
    engine._engine.step = lambda: (seen.update(true_sums(engine, divide=engine.nodes)), plain())
    update = engine.step(1e-2)
    del engine.factors
    engine._engine.step = plain
    found |= {"given": given, "applied": seen, "after": owed(engine), "was applied": update.applied, "kept on": engine.compression is not None}
    return found


def seen_early(world: World, stage: int) -> dict[str, int]:
    """Reduced gradients that DeepSpeed shows while the last gradients of a backward pass come in, and those that it shows after it; with overlap_comm."""
    engine = make_engine(Case(stage=stage, sharding="node", overlap=True), world)
    updates(engine, world, 0, 2)
    shown: list[int] = []

    def count() -> int:
        return sum(1 for tensors in engine._optimizer.averaged_gradients.values() if tensors is not None)

    def hook(gradient: Tensor) -> Tensor:
        shown.append(count())
        return gradient

    handles = [p.register_hook(hook) for name, p in engine.module.named_parameters() if name.startswith("resblocks.0")]
    backward(engine, world, 2, 1)
    for handle in handles:
        handle.remove()
    found = {"hooks": len(shown), "early": max(shown), "after": count()}
    engine.step(1e-2)
    return found


def on_four(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"full": {str(case): full_rank(world, case) for case in CASES}}
    pairs = [(case, section) for case in CASES[:1] for section in SECTIONS] + [(case, LOW) for case in CASES[1:]]
    found["low"] = [low_rank(world, case, section) for case, section in pairs]
    found["infinite"] = {str(case): infinite(world, case) for case in SKIPS}
    found["contaminated"] = contaminated(world)
    found["resumed"] = resumed(world, folder)
    found["early"] = [seen_early(world, stage) for stage in (1, 2, 3)]
    try:
        make_engine(SAVED, world, compression=LOW.model_copy(update={"rank": 3}))
    except ConfigError as error:
        found["refused"] = str(error)
    two = dataclasses.replace(SAVED, stage=2)
    found["other stage"] = elsewhere(world, f"{folder}/kept-0", two, LOW, 2)
    found["switched off"] = elsewhere(world, f"{folder}/kept-1", SAVED, EXACT, 2)
    return found


def on_three(world: World, folder: str) -> dict[str, Any]:
    found = {"three": elsewhere(world, f"{folder}/kept-0", SAVED, LOW, 1), "three of a sum": elsewhere(world, f"{folder}/kept-2", SAVED, LOW, 1)}
    engine = make_engine(SAVED, world, compression=LOW, node=1)
    restore(engine, f"{folder}/kept-0", world)
    checkpoint.save(f"{folder}/three", 5, engine.fragments(to_load=False), meta_of(engine), world, keep=1)
    return found


def on_one(world: World, folder: str) -> dict[str, Any]:
    return {"one": elsewhere(world, f"{folder}/three", SAVED, LOW, 1), "flat": elsewhere(world, f"{folder}/three", Case(stage=2), EXACT, 1)}
