"""What a drawing beside training takes from it: updates with a process of the lowest priority that draws, and without. ``launcher.py bench samples``

The real engine trains the preset's transformer on a CPU. The other process draws from a model of the same size, without end, and is stopped and continued by signals.
Needs all dependencies.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.synchronize
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from infra.world import World
from model.config import StreamShape, TransformerConfig
from model.decoder import DrawingWeights
from model.transformer import Transformer
from train.bench.harness import Result, main, start
from train.bench.sample import drawing_step
from train.config import load_run
from train.drawing.while_training import step_aside
from train.machine.rates import Options, mean_with_error, milliseconds, threads
from train.planning.demo_time_probe import dalle_update
from train.ranks.device import set_up

PRESET, PRECISION = "demo", "bf16"
TURNS, UPDATES = 20, 5
"""Pairs of turns, and updates in each: five with the drawing, between two halves without it, so that what drifts evenly cancels."""


def run(options: Options) -> Result:
    """Measure with threads for all cores, and with a core left for the drawing."""
    options = replace(options, device="cpu")
    cfg = load_run(PRESET, [f"dalle_fit.precision={PRECISION}", "dalle_fit.accumulation=1"])
    count = os.cpu_count() or 1
    sizes = {"preset": PRESET, "precision": PRECISION, "batch": cfg.dalle_fit.batch, "turns": TURNS, "updates_of_a_turn": UPDATES}
    result = start("samples", "Samples while training: what a drawing beside it takes", options, **sizes, cores=count)
    world = World.single()
    set_up(world)
    update = dalle_update(cfg, torch.bfloat16, world)
    with _drawing(cfg.dalle, cfg.stream_shape()) as pid:
        for used in sorted({max(1, count - 1), count}):
            with threads(used):
                _compare(result, update, pid, f"{used} of {count} cores train")
    result.notes += [
        "Slower: seconds of updates beside the drawing over those without it, less one; the mean of all turns, and as its range one standard error. The drawing has one thread, "
        "and an update of training waits for nothing of it. A run draws in only a part of its time: once in samples.every updates.",
        "Where no core is left over, a run draws at its evaluations instead, unless samples.where = 'beside'.",
    ]
    return result


def _compare(result: Result, update: Callable[[], None], pid: int, label: str) -> None:
    """Add the figures for the current number of threads."""

    def timed(updates: int) -> float:
        began = time.perf_counter()
        for _ in range(updates):
            update()
        return time.perf_counter() - began

    timed(2)
    alone, beside = [], []
    for _ in range(TURNS):
        before = timed(UPDATES)
        os.kill(pid, signal.SIGCONT)
        beside.append(timed(2 * UPDATES))
        os.kill(pid, signal.SIGSTOP)
        alone.append(before + timed(UPDATES))
    result.measured[f"update, {label}"] = milliseconds([seconds / (2 * UPDATES) for seconds in alone])
    slower = [100 * (with_it / without - 1) for with_it, without in zip(beside, alone, strict=True)]
    result.measured[f"slower beside a drawing, {label}"] = mean_with_error(slower, "%")


@contextmanager
def _drawing(cfg: TransformerConfig, shape: StreamShape) -> Iterator[int]:
    """The process id of a process that draws, which is stopped."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_draw, args=(cfg, shape, ready), daemon=True)
    process.start()
    assert process.pid is not None
    try:
        while not ready.wait(1.0):
            if not process.is_alive():
                raise RuntimeError(f"the drawing ended with code {process.exitcode}")
        os.kill(process.pid, signal.SIGSTOP)
        yield process.pid
    finally:
        process.kill()
        process.join()


def _draw(cfg: TransformerConfig, shape: StreamShape, ready: multiprocessing.synchronize.Event) -> None:
    step_aside()
    torch.set_num_threads(1)
    with torch.no_grad():
        step = drawing_step(DrawingWeights(Transformer(cfg, shape).requires_grad_(False), torch.float32), 1, 1, "cpu")
        step()
        ready.set()
        while True:
            step()


if __name__ == "__main__":
    main(run)
