"""What a checkpoint costs training: the time that a save blocks it, and how much it slows down later updates. ``launcher.py bench checkpoint``

Uses the real engine and the real checkpointer, a local folder, and random data. Needs all dependencies.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from infra.world import World
from train.bench.harness import Result, main, start
from train.config import load_run
from train.machine.rates import DTYPES, Figure, Options, measure
from train.planning.demo_time_probe import transformer
from train.ranks.device import set_up
from train.weights.checkpointer import Checkpointer

PRESETS = {"cpu": ("demo", "bf16"), "cuda": ("1.2B", "fp16")}
"""Device -> preset and precision."""
BETWEEN = 20
"""Number of updates between two saves."""


def run(options: Options) -> Result:
    """Measure updates without a save and updates after a save in turns. A turn takes about ``seconds``, or ``BETWEEN`` updates if that is longer."""
    preset, precision = PRESETS[options.device]
    cfg = load_run(preset, [f"dalle_fit.precision={precision}", "dalle_fit.accumulation=1"])
    world, device = World.single(), set_up(World.single())
    engine, micro_batch = transformer(cfg, DTYPES[precision], world, device)
    names = {"preset": preset, "precision": precision, "batch": cfg.dalle_fit.batch, "updates_between": BETWEEN, "threads": torch.get_num_threads()}
    result = start("checkpoint", "Checkpoints: the stall of a save, written beside training", options, **names)

    def update(before_step: Callable[[], float]) -> tuple[float, float]:
        """Make an update. Returns its seconds, and how many of them it waited for the copies of a save."""
        began = time.perf_counter()
        engine.micro_batch(last=True)
        engine.backward(micro_batch())
        measured = engine.measure().tolist()
        waited = before_step()
        engine.step(1e-4, measured)
        return time.perf_counter() - began, waited

    with tempfile.TemporaryDirectory() as folder:
        saver = Checkpointer(folder, world, keep=1)

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
            update(settle)
            save(step)
        settle()
        saver.wait()
        plain, stalls, costs = [], [], []
        for turn in range(options.runs):
            count = 0
            began = time.perf_counter()
            while count < BETWEEN or time.perf_counter() - began < options.seconds / 2:
                plain.append(update(settle)[0])
                count += 1
            began = time.perf_counter()
            stalled = save(10 + turn)
            after = [update(settle) for _ in range(count)]
            costs.append(time.perf_counter() - began - count * statistics.median(plain))
            stalls.append(stalled + after[0][1])
            saver.wait()
        state = {name: fragment.tensor for name, fragment in engine.fragments(to_load=True).items()}
    _write_down(result, state, options, plain, stalls, costs)
    return result


def _write_down(
    result: Result, state: dict[str, Tensor], options: Options, plain: Sequence[float], stalls: Sequence[float], costs: Sequence[float]
) -> None:
    """Add the figures of the saves, and the floor: a plain copy of the same number of bytes."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    targets = {name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda) for name, tensor in state.items()}

    def copy() -> None:
        for name, tensor in state.items():
            targets[name].copy_(tensor, non_blocking=True)

    rate = measure(copy, 1.0, "copies/s", options)
    result.settings["checkpoint_megabytes"] = round(size / 1e6, 1)
    result.floor["copy of the tensors to CPU memory"] = Figure(1e3 / rate.value, 1e3 / rate.max, 1e3 / rate.min, "ms", rate.runs)
    result.measured["update"] = _milliseconds(plain)
    result.measured["stall of a save"] = _milliseconds(stalls)
    result.measured["cost of a save in all"] = _milliseconds(costs)
    result.ratio("an update over a save's stall", "update", "stall of a save", goal=50.0)
    result.notes += [
        "Stall: what the loop waits for, in starting a save and before the update that follows it. In all: that, and how much slower the updates are that the writing "
        "runs beside; a difference of two times, so that the machine's own unrest is in it.",
        "The goal is a stall of at most 2 % of an update, hence 50.",
    ]


def _milliseconds(seconds: Sequence[float]) -> Figure:
    return Figure(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds), "ms", len(seconds))


if __name__ == "__main__":
    main(run)
