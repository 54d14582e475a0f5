"""Checkpoints of ZeRO engines: what they hold when they are saved, and what restores on other ranks and stages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra import storage
from infra.errors import DataError
from infra.world import World
from tests.train.engines.zero_cases import (
    Case,
    everything,
    make_engine,
    some,
    updates,
)
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import full_shape

SAVED = some(
    [
        Case(stage=2, precision="fp16", moments="16-bit"),
        Case(stage=2),
        Case(stage=3, precision="fp16", moments="16-bit", weights="fp16"),
        Case(stage=1, precision="fp16", offload=True),
        Case(stage=2, precision="fp16", moments="16-bit", options=True),
    ]
)


HALF = Case(precision="fp16", moments="16-bit")


LOADED = {
    1: {
        0: dataclasses.replace(HALF, stage=3),
        1: Case(stage=3),
        2: dataclasses.replace(HALF, stage=2),
        4: dataclasses.replace(HALF, options=True, stage=3),
    },
    2: {0: dataclasses.replace(HALF, stage=3), 1: Case(stage=1), 2: dataclasses.replace(HALF, stage=1, weights="cast")},
    3: {0: dataclasses.replace(HALF, stage=1), 1: Case(stage=3), 2: dataclasses.replace(HALF, stage=2)},
    4: {
        0: dataclasses.replace(HALF, sharding="node"),
        1: Case(stage=2, sharding="node"),
        2: dataclasses.replace(HALF, stage=3, weights="cast"),
        4: dataclasses.replace(HALF, options=True, stage=1),
    },
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
    """Which checkpoint is restored where one rank alone finds the newer one damaged: rank 0 its facts, rank 1 its index, or its part of the tensors."""
    engine, url = make_engine(Case(stage=2), world), f"{folder}/damaged"
    for step in (1, 2):
        updates(engine, world, step - 1, step)
        checkpoint.save(url, step, engine.fragments(to_load=False), meta_of(engine), world, keep=2)
    plain = storage.read_at_most

    def cut_short(rank: int, name: str) -> Callable[[str, int], bytes]:
        def read(place: str, most: int) -> bytes:
            if world.rank == rank and place.endswith(f"step-00000002/{name}.json"):
                raise DataError(f"{place}: as if cut short")
            return plain(place, most)

        return read

    def newest() -> int:
        meta = checkpoint.load_newest(url, engine.fragments(to_load=True), world)
        assert meta is not None
        return int(meta["step"])

    found = {}
    for rank, name in ((0, "meta"), (1, "index")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "read_at_most", cut_short(rank, name))
            found[name] = newest()
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
    meta = checkpoint.load_newest(url, engine.fragments(to_load=True), world, lambda meta: engine.more_to_load(meta["engine"]))
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
