"""What is measured of ZeRO in several processes; tests/train/engines/test_zero.py judges it. Processes are dear to start: each group of them does many things."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra.errors import CheckpointError, ConfigError
from infra.world import World
from tests.train.engines.zero_cases import (
    CONFIG,
    Case,
    backward,
    batch_of,
    every_case,
    everything,
    fit_of,
    make_engine,
    make_model,
    pairwise,
    scales_of,
    some,
    updates,
    zero_of,
)
from tests.train.engines.zero_checkpoints import fall_back, gathered, in_nodes, load_all, save_all
from tests.train.engines.zero_reference import compare
from train.engines.zero import internals, measures, one_pass
from train.stages import dalle_init_from
from train.weights import checkpoint
from train.weights.fragments import full_shape

DEEP = dataclasses.replace(CONFIG, layers=12)
MATRIX = pairwise(every_case(), ("stage", "precision", "weights", "checkpointing", "accumulation"))
OTHERS = [
    Case(stage=2, precision="fp16", sharding="node", constant=2),
    Case(stage=3, precision="fp16", sharding="node", accumulation=2),
    Case(stage=1, precision="fp32", sharding="node", overlap=True),
    Case(stage=2, precision="fp16", sharding="node", offload=True),
    Case(stage=2, precision="fp16", moments="16-bit", offload=True),
    Case(stage=3, precision="fp16", offload=True, accumulation=2),
    Case(stage=2, precision="fp16", scope="none"),
    Case(stage=3, precision="fp16", scope="global", overlap=True, constant=-4),
    Case(stage=1, precision="bf16", options=True),
    Case(stage=2, precision="fp16", checkpointing=True, options=True),
    Case(stage=3, precision="fp16", accumulation=2, options=True),
]


FLAT = [*some(MATRIX), *(case for case in OTHERS if case.sharding == "flat")]


def compare_all(world: World, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {str(case): compare(world, case) for case in cases}


CURVES = {Case(stage=1): 1e-5, Case(stage=3, precision="fp16"): 2e-3}
"""Relative bounds within which losses do not depend on the number of processes."""


def curves(world: World) -> dict[str, list[float]]:
    return {str(case): [loss for loss, *_ in updates(make_engine(case, world), world, 0, 8)] for case in CURVES}


INFINITE = some(
    [
        Case(stage=1, precision="fp16"),
        Case(stage=2, precision="fp16", weights="cast", moments="16-bit"),
        Case(stage=3, precision="fp16"),
        Case(stage=2, precision="fp16", skip="resblock"),
        Case(stage=2, precision="fp16", offload=True),
    ]
)


def overflow(world: World, *, filters: bool) -> dict[str, Any]:
    """One update in which gradients of activations overflow within resblock 1: what becomes of it, and which gradients were not finite."""
    engine = make_engine(Case(stage=2, precision="fp16", filter=filters), world)
    updates(engine, world, 0, 1)
    hook = engine.module.resblocks[1].mlp_2.register_full_backward_hook(lambda module, into, out: (torch.full_like(into[0], float("inf")),))
    backward(engine, world, 1, 1)
    hook.remove()
    measured = engine.measure().tolist()
    update = engine.step(1e-2, measured)
    return {"applied": update.applied, "overflow": update.overflow, "bad": measures.agreed(measured, 5, replicas=1).bad}


def between_nodes(world: World) -> dict[str, dict[str, int]]:
    """Elements that an update sends between nodes, by dtype, and those of this rank's shard, of block matrices and of the rest."""
    out = {}
    for case in BETWEEN:
        engine = make_engine(case, world)
        updates(engine, world, 0, 1)
        sent: dict[str, int] = {}
        plain = dist.all_reduce

        def counted(tensor: torch.Tensor, *given: Any, plain: Any = plain, engine: Any = engine, sent: dict[str, int] = sent, **named: Any) -> Any:
            if named.get("group") is engine.topology.between:
                sent[str(tensor.dtype)] = sent.get(str(tensor.dtype), 0) + tensor.numel()
            return plain(tensor, *given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_reduce", counted)
            updates(engine, world, 1, 2)
        held = {True: 0, False: 0}
        for piece in engine.pieces:
            held[engine.tags[piece.name].is_block_matrix] += piece.length
        out[str(case)] = sent | {"matrices": held[True], "others": held[False]}
    return out


BETWEEN = [Case(stage=2, precision="fp16", sharding="node"), Case(stage=3, precision="fp16", sharding="node"), Case(stage=1, sharding="node")]
INFINITE_IN_NODES = [Case(stage=stage, precision="fp16", sharding="node") for stage in (2, 3)]


def outputs(engine: Any) -> torch.Tensor:
    """What a forward pass says of a batch."""
    batch = batch_of(5)
    with torch.no_grad():
        return torch.cat([nll.flatten() for nll in engine(batch["text"], batch["lengths"], batch["codes"])])


def inject(world: World, case: Case) -> dict[str, Any]:
    """Two updates, one with an Inf in a parameter gradient of resblock 1 on the last rank, three more."""
    engine = make_engine(case, world)
    history = updates(engine, world, 0, 2)
    before, scales, plain = everything(engine), engine.scales.values(), outputs(engine)
    with engine.averaged():
        averaged = outputs(engine)
    # Masters and parameters come back from this bit for bit.
    assert all(torch.equal(value, before[name]) for name, value in everything(engine).items()) and torch.equal(outputs(engine), plain)
    other = make_engine(case, world)
    for name, fragment in other.fragments(to_load=True).items():
        if name.startswith("model/"):
            fragment.tensor.copy_(before[name.replace("model/", "average/", 1)])
    other.loaded(0)
    assert torch.equal(outputs(other), averaged) and not torch.equal(averaged, plain)
    matrix = engine.module.resblocks[1].mlp_1.weight
    hook = matrix.register_hook(lambda grad: torch.full_like(grad, float("inf")) if world.rank == world.size - 1 else grad)
    (poisoned,) = updates(engine, world, 2, 3)
    hook.remove()
    after = everything(engine)
    out = {
        "applied": poisoned[2],
        "changed": sorted(name for name, value in after.items() if not torch.equal(value, before[name])),
        "ratios": [new / old for new, old in zip(engine.scales.values(), scales, strict=True)],
        "overflows": engine.scales.overflows,
        "count": engine.updates,
    }
    return out | {"history": history + updates(engine, world, 3, 6)}


def stepped(world: World) -> dict[str, dict[str, bool]]:
    """Whether updates in one pass are those of DeepSpeed's own step, bit for bit: losses, norms, what forward passes read, and the state."""
    out = {}
    for case in ONE_PASS:
        ends: list[dict[str, Any]] = []
        taken = []
        for own in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if own:
                    patch.setattr(one_pass, "install", lambda *_: None)
                engine = make_engine(case, world)
            taken.append(bool({"step", "_optimizer_step"} & vars(engine._optimizer).keys()))
            history = updates(engine, world, 0, 4, case.accumulation)
            ends.append({"history": torch.tensor(history), "from the copies": outputs(engine)} | gathered(engine))
        out[str(case)] = {name: torch.equal(value, ends[1][name]) for name, value in ends[0].items()} | {
            "taken over in the first alone": taken == [True, False]
        }
    return out


def offloaded(world: World) -> dict[str, dict[str, bool]]:
    """Whether updates whose optimizer is on the CPU are those without, bit for bit."""
    out = {}
    for case in OFFLOADED:
        ends = []
        for engine in (make_engine(dataclasses.replace(case, offload=offload), world) for offload in (False, True)):
            history = updates(engine, world, 0, 4, case.accumulation)
            with engine.averaged():
                averaged = outputs(engine)
            ends.append({"history": torch.tensor(history), "outputs": outputs(engine), "averaged": averaged} | gathered(engine))
        out[str(case)] = {name: torch.equal(value, ends[1][name]) for name, value in ends[0].items()}
    return out


OFFLOADED = some(
    [
        Case(stage=1, accumulation=2),
        Case(stage=2, precision="fp16", moments="16-bit"),
        Case(stage=3, precision="fp16", moments="16-bit", accumulation=2),
    ]
)
ONE_PASS = some(
    [
        Case(stage=stage, precision="fp16", weights=weights, moments="16-bit", accumulation=accumulation)
        for stage, weights, accumulation in ((1, "fp16", 2), (2, "fp16", 1), (2, "cast", 2), (3, "fp16", 1), (3, "cast", 2))
    ]
    + [Case(stage=1), Case(stage=3, precision="bf16")]
)
WIRED = some([Case(stage=stage, precision="fp16", weights=weights) for stage in (1, 2, 3) for weights in ("fp16", "cast")] + [Case(stage=2)])


def wire(world: World) -> dict[str, dict[str, int]]:
    """Elements that an update sends through reductions, and through gathers of parameters, by dtype."""
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    out: dict[str, dict[str, int]] = {}
    for case in WIRED:
        engine = make_engine(case, world)
        updates(engine, world, 0, 2)  # DeepSpeed's timers would begin with the third
        sent: dict[str, int] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "Popen", lambda *given, **named: pytest.fail(f"an update starts a process: {given}"))
            patch.setattr(accelerator, "synchronize", lambda *_: pytest.fail("an update waits for the whole device"))
            for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather"):
                patch.setattr(backend, name, counting(getattr(backend, name), "reduce" if "reduce" in name else "gather", sent))
            updates(engine, world, 2, 3)
        stored = [p.ds_tensor if case.stage == 3 else p for p in engine.module.parameters()] + engine._masters()
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored}
        out[str(case)] = sent | {"held": sum(held.values())}
    return out


def counting(plain: Any, kind: str, sent: dict[str, int]) -> Any:
    def counted(*given: Any, **named: Any) -> Any:
        tensors = [value for value in (*given, *named.values()) if torch.is_tensor(value)]
        if tensors:
            largest = max(tensors, key=torch.Tensor.numel)
            key = f"{kind} {largest.dtype}".replace("torch.", "")
            sent[key] = sent.get(key, 0) + largest.numel()
        return plain(*given, **named)

    return counted


def construction(world: World) -> dict[str, Any]:
    """Most elements of parameters that a process ever held while a model for stage 3 was built, and what it holds then; its weights, read whole."""
    from train.engines.zero.construction import sharded_construction
    from train.engines.zero.engine import ZeroEngine

    made: list[Any] = []
    most = 0
    plain = torch.nn.init.normal_

    def counting_normal(p: Any, *given: Any, **named: Any) -> Any:
        nonlocal most
        made.append(p)
        most = max(most, sum(q.numel() + (q.ds_tensor.numel() if hasattr(q, "ds_tensor") else 0) for q in made))
        return plain(p, *given, **named)

    case = Case(stage=3, precision="fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "normal_", counting_normal)
        with sharded_construction(fit_of(case), zero_of(case), world):
            model = make_model("fp16", config=DEEP)
    shapes = {name: tuple(full_shape(p)) for name, p in model.named_parameters()}
    held = sum(p.numel() + p.ds_tensor.numel() for p in model.parameters())  # type: ignore[attr-defined]
    engine = ZeroEngine(model, fit_of(case), zero_of(case), world, scales_of(case))
    tensors = {name: p.detach() + 1 for name, p in make_model(config=DEEP, seed=5).named_parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dalle_init_from.export, "read_tensors", lambda _: ("hash", tensors))
        dalle_init_from.load(engine, "url", "dalle_fit.init_from")
    whole, copies = gathered(engine, ("model", "average")), {}
    for name, p in model.named_parameters():
        p.all_gather()  # type: ignore[operator]
        copies[name] = p.detach().clone()
        p.partition()  # type: ignore[operator]
    loaded = {
        name: all(torch.equal(whole[f"{kind}/{name}"], tensor.flatten().double()) for kind in ("model", "average"))
        and torch.equal(copies[name], tensor.to(copies[name].dtype))
        for name, tensor in tensors.items()
    }
    return {"most": most, "held": held, "shapes": shapes, "loaded": loaded, "dtypes": {p.dtype for p in copies.values()}}


def on_two(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"matrix": compare_all(world, FLAT)}
    found["construction"] = construction(world)
    return found | {
        "infinite": {str(case): inject(world, case) for case in INFINITE},
        "saved": save_all(world, folder),
        "fallen back": fall_back(world, folder),
        "wire": wire(world),
        "stepped": stepped(world),
        "offloaded": offloaded(world),
    }


def on_four(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"node": compare_all(world, [case for case in OTHERS if case.sharding == "node"])}
    try:
        make_engine(Case(sharding="node"), World(world.rank, 3, world.rank, 2))
    except ConfigError as error:
        found["refused"] = str(error)
    found["between"] = between_nodes(world)
    found |= {"nodes": in_nodes(world, folder), "infinite": {str(case): inject(world, case) for case in INFINITE_IN_NODES}}
    return found | {"curves": curves(world), "loaded": load_all(world, folder)}


def on_one(world: World, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {"curves": curves(world), "loaded": load_all(world, folder)}
    found["overflow"] = {filters: overflow(world, filters=filters) for filters in (True, False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(internals.deepspeed, "__version__", "0.19.9")
        later = make_engine(Case(stage=2, precision="fp16"), world)
    found["taken over from a later version"] = "step" in vars(later._optimizer)
    plain = make_engine(Case(stage=2, precision="fp16"), world)
    try:
        checkpoint.load(f"{folder}/0", 3, plain.fragments(to_load=True))
    except CheckpointError as error:
        found["refused"] = str(error)
    return found
