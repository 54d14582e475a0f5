"""What checkpoints cost training: the stall of a save, the slower updates beside its writing, and a restore. ``launcher.py bench checkpoint``

Uses the real engine and the real checkpointer, a local folder, and random data. Needs all dependencies.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from infra.world import World
from train.bench.harness import Result, main, start
from train.config import load_run
from train.machine.rates import DTYPES, Figure, Options, mean_with_error, measure, milliseconds
from train.planning.demo_time_probe import transformer
from train.ranks.device import set_up
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import even_slice

PRESETS = {"cpu": ("demo", "bf16"), "cuda": ("1.2B", "fp16")}
"""Device -> preset and precision."""
_SMALLER: dict[str, list[str]] = {"cpu": [], "cuda": ["dalle_fit.batch=8", "dalle.layers=6"]}
"""Device -> overrides. The preset's batch is of all GPUs together, and one GPU has no memory for it; six layers are a checkpoint of 4 GB, which a disk takes in seconds."""
BETWEEN = 20
"""Updates without a save, and after one, in a turn: the writing has ended before as many are over."""
SAVES = {"cpu": 4, "cuda": 1}
"""Device -> saves for each run: 20 with the default of five, so that the standard error of their cost says something. A GPU, whose checkpoint is of gigabytes, gets one."""
READINGS = 5
"""Of a checkpoint's files, as often as restores of it; on a GPU two."""
LARGE, LARGE_COUNT = 4 << 20, 300
"""Bytes of a tensor of a checkpoint that is large enough for its restore to be bounded by bytes, and their number."""
SHARE = 0.005
"""A save, with all that it slows down, should take at most so much of the time between two saves."""


@dataclass
class _Turns:
    """Seconds of the updates and saves of all turns."""

    plain: list[float] = field(default_factory=list)
    """Of each update without a save."""
    stalls: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    """Of each save: the updates from it on, minus as many without a save, half of them before it and half after its writing has ended. So what drifts evenly cancels."""


def run(options: Options) -> Result:
    """Measure updates without a save and updates after a save in turns of 2 x ``BETWEEN`` updates, ``SAVES`` for each run; then restores."""
    preset, precision = PRESETS[options.device]
    cfg = load_run(preset, [f"dalle_fit.precision={precision}", "dalle_fit.accumulation=1", *_SMALLER[options.device]])
    world, device = World.single(), set_up(World.single())
    engine, micro_batch = transformer(cfg, DTYPES[precision], world, device)
    sizes = {"preset": preset, "precision": precision, "batch": cfg.dalle_fit.batch, "save_every": cfg.dalle_fit.save_every}
    saves = max(2, SAVES[options.device] * options.runs)
    counts = {"updates_between": BETWEEN, "saves": saves, "threads": torch.get_num_threads()}
    result = start("checkpoint", "Checkpoints: the cost of a save beside training, and of a restore", options, **sizes, **counts)

    with tempfile.TemporaryDirectory() as folder:
        saver = Checkpointer(folder, world, keep=1)

        def update() -> tuple[float, float]:
            """Make an update. Returns its seconds, and how many of them it waited for the copies of a save."""
            began = time.perf_counter()
            engine.micro_batch(last=True)
            engine.backward(micro_batch())
            measured = engine.measure().tolist()
            waited = settle()
            engine.step(1e-4, measured)
            return time.perf_counter() - began, waited

        def save(step: int) -> float:
            began = time.perf_counter()
            saver.save(step, engine.fragments(to_load=False), {"shapes": {}}, ready=engine.average.wait)
            return time.perf_counter() - began

        def settle() -> float:
            """Wait for the copies. On a GPU the engine only lets the queue wait for them, so here this process waits for the queue, which holds nothing else."""
            began = time.perf_counter()
            saver.settle()
            if options.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        for step in range(2):  # the first updates create the moments, the buffers for copies, and so on
            update()
            save(step)
        settle()
        saver.wait()
        turns = _Turns()
        for turn in range(saves):
            _turn(turns, update, partial(save, 10 + turn), saver.wait)
            result.measured["update"], result.measured["stall of a save"] = milliseconds(turns.plain), milliseconds(turns.stalls)  # so far
        state = {name: fragment.tensor for name, fragment in engine.fragments(to_load=True).items()}
        _saves(result, state, options, turns, cfg.dalle_fit.save_every)
        _restores(result, Path(folder), lambda: checkpoint.load_newest(folder, engine.fragments(to_load=True), world), "", None)
    _large_restores(result, world)
    result.notes += [
        "Stall: what the loop waits for, in starting a save and before the update that follows it. Cost: that, and how much slower the updates are that the writing runs "
        f"beside: {BETWEEN} updates from a save on, less {BETWEEN} without one, half of them before the save and half after. The mean of all saves, and as its range one standard error; "
        "'at most' is its upper end, and no less than the stall.",
        f"Goals: a stall of at most 2 % of an update, hence 50, and of at most 0.75 of a copy, hence 1.33; a cost of at most {SHARE:.1%} of the updates between two saves of the preset; a restore, "
        "with the hashes of all bytes, of at most twice the plain reading, both from files that the system no longer has in memory; a small one is bounded by the work for each tensor instead.",
    ]
    return result


def _turn(turns: _Turns, update: Callable[[], tuple[float, float]], save: Callable[[], float], wait: Callable[[], None]) -> None:
    """Half of the updates without a save, a save with all updates after it, and the other half."""
    before = [update()[0] for _ in range(BETWEEN // 2)]
    began = time.perf_counter()
    stalled = save()
    after = [update() for _ in range(BETWEEN)]
    wait()
    spent = time.perf_counter() - began
    before += [update()[0] for _ in range(BETWEEN - BETWEEN // 2)]
    turns.plain += before
    turns.stalls.append(stalled + after[0][1])
    turns.costs.append(spent - sum(before))


def _saves(result: Result, state: dict[str, Tensor], options: Options, turns: _Turns, save_every: int) -> None:
    """Add the figures of the saves, and the floor of a stall: a plain copy of the same number of bytes."""
    targets = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda) for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            targets[name].copy_(tensor, non_blocking=True)

    rate = measure(copy, 1.0, "copies/s", options)
    result.settings["checkpoint_megabytes"] = round(sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 1e6, 1)
    result.floor["copy of the tensors to CPU memory"] = Figure(1e3 / rate.value, 1e3 / rate.max, 1e3 / rate.min, "ms", rate.runs)
    stall = result.measured["stall of a save"]
    result.measured["cost of a save"] = cost = mean_with_error([1e3 * seconds for seconds in turns.costs], "ms")
    most = max(cost.max, stall.value)
    result.measured["cost of a save at most"] = Figure(most, most, most, "ms", len(turns.costs))
    allowed = SHARE * save_every * result.measured["update"].value
    result.measured["cost allowed"] = Figure(allowed, allowed, allowed, "ms", 1)
    result.ratio("an update over a save's stall", "update", "stall of a save", goal=50.0)
    result.ratio("a copy over a save's stall", "copy of the tensors to CPU memory", "stall of a save", goal=4 / 3)
    result.ratio("cost allowed over a save's cost at most", "cost allowed", "cost of a save at most", goal=1.0)


def _restores(result: Result, folder: Path, restore: Callable[[], object], size: str, goal: float | None) -> None:
    """Add the figures of a restore, and its floor: plain reading. In turns, each time from the storage and then from memory."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    buffer = bytearray(1 << 20)

    def read() -> None:
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    taken: dict[str, list[float]] = {}
    for _ in range(min(READINGS, 2) if result.device["kind"] == "cuda" else READINGS):
        for name, work in ((f"plain reading{size}", read), (f"restore{size}", restore)):
            _forget(files)
            for place in ("from storage", "from memory"):
                began = time.perf_counter()
                work()
                taken.setdefault(f"{name}, {place}", []).append(time.perf_counter() - began)
                (result.floor if work is read else result.measured)[f"{name}, {place}"] = milliseconds(taken[f"{name}, {place}"])  # so far
    for place, least in (("from storage", goal), ("from memory", None)):
        result.ratio(f"plain reading{size} over a restore, {place}", f"plain reading{size}, {place}", f"restore{size}, {place}", goal=least)


def _large_restores(result: Result, world: World) -> None:
    with tempfile.TemporaryDirectory() as folder:
        large = {f"model/{index}": even_slice(torch.zeros(LARGE // 4), 0, 1) for index in range(LARGE_COUNT)}
        checkpoint.save(folder, 1, large, {"shapes": {}}, world, keep=1)
        size = f" of {LARGE * LARGE_COUNT / 1e6:.0f} MB"
        _restores(result, Path(folder), lambda: checkpoint.load_newest(folder, large, world), size, goal=0.5)


def _forget(files: Sequence[Path]) -> None:
    """Let the system drop these files from memory."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main(run)
