"""What is measured of ZeRO in several processes; tests/train/engines/test_zero.py judges it. Processes are dear to start: each group of them does many things."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra import storage
from infra.errors import CheckpointError, ConfigError, DataError
from infra.world import World
from tests.train.engines.zero_cases import (
    CONFIG,
    Case,
    backward,
    batch_of,
    every_case,
    fit_of,
    make_engine,
    make_model,
    pairwise,
    reference_gradients,
    scales_of,
    true_gradients,
    updates,
    zero_of,
)
from train.engines.zero import internals, measures, one_pass
from train.stages import dalle_init_from
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import full_shape

CLIP = 0.25
"""Small enough to clip."""
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
]


def some(cases: list[Case]) -> list[Case]:
    """All of them; the first alone where .ci/mutants.py, which runs them hundreds of times, asks for few."""
    return cases[:1] if os.environ.get("TESTS_QUICK") else cases


FLAT = [*some(MATRIX), *(case for case in OTHERS if case.sharding == "flat")]


def compare(world: World, case: Case, device: str = "cpu") -> dict[str, float]:
    """Gradient, loss and mean moment of the first update against the reference: the moment is what AdamW was given, so it shows factors and clipping."""
    engine = make_engine(case, world, device=device, clip_norm=CLIP)
    if engine.scales is not None and case.scope == "resblock":
        engine.scales.exponents = [exponent - index for index, exponent in enumerate(engine.scales.exponents)]  # so that no two slots are alike
        engine._publish_scales()
    loss = backward(engine, world, 0, case.accumulation)
    measured = engine.measure()
    assert torch.equal(engine.measure(), measured), "a second look changes no gradient"
    dist.all_reduce(measured)
    shards = true_gradients(engine)
    expected_loss, expected = reference_gradients(0, half_weights=engine.storage == "fp16")
    error = size = 0.0
    for name, gradient in expected.items():
        found = shards.get(name, torch.zeros_like(gradient))
        if world.size > 1:
            dist.all_reduce(found)
        found /= engine.nodes
        error, size = error + float((found - gradient).square().sum()), size + float(gradient.square().sum())
    update = engine.step(1e-2, measured.tolist())
    clip, moment = 0.1 * CLIP / math.sqrt(size), 0.0
    if case.moments == "fp32":
        moments = gathered(engine, ("optimizer/exp_avg",))
        moment = math.sqrt(
            sum(float((moments[f"optimizer/exp_avg/{name}"] / clip - gradient).square().sum()) for name, gradient in expected.items()) / size
        )
    later = updates(engine, world, 1, 4, case.accumulation)
    return {
        "loss": abs(loss / expected_loss - 1),
        "gradient": math.sqrt(error / size),
        "norm": abs(update.grad_norm / math.sqrt(size) - 1),
        "applied": float(update.applied and all(applied for *_, applied in later)),
        "clipped": float(update.grad_norm > CLIP),
        "moment": moment,
    }


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


def everything(engine: Any) -> dict[str, torch.Tensor]:
    """Masters, moments and averages of this rank."""
    return {name: fragment.tensor.clone() for name, fragment in engine.fragments(to_load=True).items()}


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


SAVED = some(
    [
        Case(stage=2, precision="fp16", moments="16-bit"),
        Case(stage=2),
        Case(stage=3, precision="fp16", moments="16-bit", weights="fp16"),
        Case(stage=1, precision="fp16", offload=True),
    ]
)
HALF = Case(precision="fp16", moments="16-bit")
LOADED = {
    1: {0: dataclasses.replace(HALF, stage=3), 1: Case(stage=3), 2: dataclasses.replace(HALF, stage=2)},
    2: {0: dataclasses.replace(HALF, stage=3), 1: Case(stage=1), 2: dataclasses.replace(HALF, stage=1, weights="cast")},
    3: {0: dataclasses.replace(HALF, stage=1), 1: Case(stage=3), 2: dataclasses.replace(HALF, stage=2)},
    4: {0: dataclasses.replace(HALF, sharding="node"), 1: Case(stage=2, sharding="node"), 2: dataclasses.replace(HALF, stage=3, weights="cast")},
}
"""Number of ranks -> index of the saved case -> what loads it."""


def save_all(world: World, folder: str) -> dict[int, Any]:
    out: dict[int, Any] = {}
    for index, case in enumerate(SAVED):
        engine = make_engine(case, world)
        assert engine.fragments(to_load=False).keys() == engine.fragments(to_load=True).keys(), (
            "a checkpoint before the first applied update is whole"
        )
        out[index] = save_and_go_on(engine, case, f"{folder}/{index}", world)
    return out


def meta_of(engine: Any) -> dict[str, Any]:
    """What ``restore`` asks of a checkpoint's facts."""
    return {"shapes": {}, "updates": engine.updates, "engine": engine.state()}


def save_and_go_on(engine: Any, case: Case, url: str, world: World) -> dict[str, Any]:
    """Three updates, a checkpoint, twenty more while it is written; and the same twenty after a restore."""
    updates(engine, world, 0, 3)
    saver = Checkpointer(url, world, keep=2)
    saver.save(3, engine.fragments(to_load=False), meta_of(engine), ready=engine.average.wait)
    saver.settle()
    found = {"gathered": gathered(engine), "scales": engine.scales and [s / world.size for s in engine.scales.values()]}
    found["losses"] = [loss for loss, *_ in updates(engine, world, 3, 23)]
    saver.wait()
    again = make_engine(case, world, seed=99)
    restore(again, url, world)
    return found | {"again": [loss for loss, *_ in updates(again, world, 3, 23)]}


NODES = [dataclasses.replace(HALF, sharding="node"), Case(stage=3, sharding="node")]


def in_nodes(world: World, folder: str) -> dict[int, Any]:
    """Node-local sharding: checkpoints, resumed alike and flat; whether replicas are equal bit for bit after 23 updates."""
    out: dict[int, Any] = {}
    for index, case in enumerate(NODES):
        engine, url = make_engine(case, world), f"{folder}/node-{index}"
        out[index] = save_and_go_on(engine, case, url, world)
        whole = gathered(engine)
        mine = {name: whole[name][f.offset : f.offset + f.tensor.numel()] for name, f in engine.fragments(to_load=True).items()}
        equal = torch.tensor(float(all(torch.equal(mine[name], value.double()) for name, value in everything(engine).items())))
        dist.all_reduce(equal, op=dist.ReduceOp.MIN)
        flat = make_engine(dataclasses.replace(case, sharding="flat", stage=2), world, seed=99)
        restore(flat, url, world)
        out[index] |= {"replicas": bool(equal), "flat": gathered(flat), "flat losses": [loss for loss, *_ in updates(flat, world, 3, 23)]}
    return out


def fall_back(world: World, folder: str) -> dict[str, int]:
    """Which checkpoint is restored where rank 1 alone finds the newer one damaged: what it reads of meta.json, and its part of the tensors."""
    engine, url = make_engine(Case(stage=2), world), f"{folder}/damaged"
    for step in (1, 2):
        updates(engine, world, step - 1, step)
        checkpoint.save(url, step, engine.fragments(to_load=False), meta_of(engine), world, keep=2)
    plain = storage.read_json

    def cut_short(place: str) -> Any:
        if world.rank == 1 and place.endswith("step-00000002/meta.json"):
            raise DataError(f"{place}: as if cut short")
        return plain(place)

    def newest() -> int:
        meta = checkpoint.load_newest(url, engine.fragments(to_load=True), world)
        assert meta is not None
        return int(meta["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_json", cut_short)
        found = {"meta": newest()}
    if world.is_main:
        file = Path(checkpoint.folder(url, 2), "rank-1.bin")
        data = bytearray(file.read_bytes())
        data[100] ^= 1
        file.write_bytes(data)
    dist.barrier()
    return found | {"tensors": newest()}


KINDS = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq", "average")


def gathered(engine: Any, kinds: tuple[str, ...] = KINDS) -> dict[str, torch.Tensor]:
    """Whole masters, moments and averages, from all shards."""
    out = {}
    fragments = engine.fragments(to_load=True)
    for name in (f"{kind}/{parameter}" for kind in kinds for parameter, _ in engine.module.named_parameters()):
        fragment = fragments.get(name)
        whole = torch.zeros(math.prod(full_shape(engine.module.get_parameter(name.split("/")[-1]))), dtype=torch.float64)
        if fragment is not None:
            whole[fragment.offset : fragment.offset + fragment.tensor.numel()] = fragment.tensor.double()
        if engine.world.size > 1:
            dist.all_reduce(whole)
        out[name] = whole / engine.nodes
    return out


def restore(engine: Any, url: str, world: World) -> None:
    meta = checkpoint.load_newest(url, engine.fragments(to_load=True), world)
    assert meta is not None
    engine.loaded(meta["updates"])
    engine.restore(meta["engine"])


def load_all(world: World, folder: str) -> dict[int, Any]:
    out: dict[int, Any] = {}
    for index, case in LOADED[world.size].items():
        engine = make_engine(case, world, seed=99)
        restore(engine, f"{folder}/{index}", world)
        out[index] = {"gathered": gathered(engine), "scales": engine.scales and [s / world.size for s in engine.scales.values()]}
        out[index]["losses"] = [loss for loss, *_ in updates(engine, world, 3, 23)]
    return out


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
