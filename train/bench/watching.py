"""What watching a run costs its training loop: time inside our calls over the loop's, summed over its updates. ``python -m train.bench.watching``

The real trainer trains a small dVAE on fixed pictures, in this process, which listens to itself as a launcher does. Every call of the loop to metrics and
TensorBoard, to the line and the signs of life, and to the clock of phases is timed; so is what a slot for each of 1,024 ranks adds to the step's message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from infra import listening, live
from infra.job import Job
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.config import DVAEConfig
from model.dvae import DVAE
from model.dvae import loss as elbo
from model.relaxation import GumbelNoise
from train.bench.harness import Result, main, start
from train.config import FitSection
from train.engines.replicated import ReplicatedEngine
from train.loop.metrics import MetricsWriter
from train.loop.phases import Phases
from train.loop.task import Loss
from train.loop.trainer import Trainer
from train.loop.watching import Watched
from train.machine.rates import Figure, Options, measure
from train.ranks.signal_vector import SignalVector

_UPDATES = 1000
_RANKS = 1024
_SMALL = DVAEConfig(image_size=16, downsample=4, groups=2, blocks_per_group=1, width=32, init_width=16, vocab=256)
_BATCH = 8
_CALLS = {
    "metrics and TensorBoard": ((MetricsWriter, "scalars"),),
    "line, signs of life, speed": ((Watched, "updated"),),
    "phases": ((Phases, "begin"), (Phases, "ended"), (Phases, "forward"), (Phases, "forward_ended"), (Phases, "own_s")),
}
"""What is timed: methods that the loop calls."""
_MOST = 0.01
"""Share of the loop's time that all of it may take."""


class _Task:
    """The dVAE's loss, on fixed pictures."""

    metrics: tuple[str, ...] = ("loss", "nll", "kl")
    unit = "images"
    curve: Any = None

    def schedule(self, step: int) -> dict[str, float]:
        return {"lr": 1e-4, "tau": 0.5}

    def denominators(self, batches: list[Any]) -> dict[str, float]:
        return {}

    def loss(self, engine: Any, batch: Any, step: int, at: Mapping[str, float], denominators: Any) -> Loss:
        pixels_B3YX = batch["pixels"]
        terms = engine(pixels_B3YX, GumbelNoise(list(range(len(pixels_B3YX))), pixels_B3YX.device), at["tau"])
        total = elbo(terms.nll_B, terms.kl_B, 6.6, _SMALL.downsample).mean()
        return Loss(total, {"loss": total, "nll": terms.nll_B.mean(), "kl": terms.kl_B.mean()})

    def evaluate(self, *_: Any) -> dict[str, float]:
        return {}

    def units(self, batch: Any) -> int:
        return len(batch["pixels"])


class _Loader:
    def __init__(self, device: str) -> None:
        self.batch = {
            "ids": [str(number) for number in range(_BATCH)],
            "pixels": torch.rand(_BATCH, 3, _SMALL.image_size, _SMALL.image_size, device=device),
        }

    def next(self) -> dict[str, Any]:
        return self.batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds inside the calls of _CALLS."""

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def inner(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **named)
            finally:
                spent[name] += time.perf_counter() - began

        return inner

    with ExitStack() as stack:
        for name, methods in _CALLS.items():
            for owner, method in methods:
                stack.enter_context(mock.patch.object(owner, method, watched(name, getattr(owner, method))))
        yield


def run(options: Options) -> Result:
    """Shares of the loop's time."""
    device = torch.device(options.device)
    updates = max(50, int(_UPDATES * min(1.0, options.seconds)))
    result = start(
        "watching", "Watching: what it costs the training loop", options, updates=updates, log_every=10, model="a dVAE of 16x16 pixels", batch=_BATCH
    )
    spent = dict.fromkeys(_CALLS, 0.0)
    with TemporaryDirectory() as folder:
        torch.manual_seed(0)
        engine = ReplicatedEngine(DVAE(_SMALL).to(device), World.single(), betas=(0.9, 0.999), weight_decay=0.0, ema=0.99)
        section = FitSection(steps=updates, save_every=10 * updates, eval_every=10 * updates)
        task: Any = _Task()
        fit = Trainer("watching", task, engine, _Loader(options.device), section, RunFolder(folder), World.single(), StopFlag(), device)
        with listening.listening(folder, "watching", 0, Job()), timed(spent):
            live.begin(0)
            fit.run_to_end()
            live.end()
    loop_s = fit._update_s + sum(spent.values())
    each = 1000 * loop_s / updates
    result.measured["an update"] = Figure(each, each, each, "ms", updates)
    for name, seconds in spent.items():
        share = 100 * seconds / loop_s
        result.measured[name] = Figure(share, share, share, "% of the loop", updates)
    whole = 100 * sum(spent.values()) / loop_s
    result.measured["all of it"] = Figure(whole, whole, whole, "% of the loop", updates)
    for name, world in (("a message", None), (f"a message with a slot for each of {_RANKS} ranks", World(0, _RANKS, 0, 8))):
        vector = SignalVector(task.metrics, device, world)
        result.measured[name] = measure(partial(vector.exchange_with, {"loss": 1.0}, None, 0.5), 1.0, "messages/s", options)
    verdict = "within" if whole < 100 * _MOST else "above"
    result.notes.append(
        f"All of it took {whole:.2f} % of the loop, {verdict} the goal of {100 * _MOST:.0f} %. Updates of real models are longer, and the calls are not."
    )
    return result


if __name__ == "__main__":
    main(run)
