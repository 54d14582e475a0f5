"""Estimates how long the demo will take on this machine, by a probe of about 20 seconds with the real networks and engines. Needs no torch.

The estimate has these parts, which agree with recorded demos (docs/demo.md; tests/train/planning/test_demo_time.py): updates at the probe's rates, collectives
included; starts of processes, which take as long as the probe's start; loading, evaluations and saves; and the other stages, whose recorded seconds are scaled by
the speed of this machine.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from infra import ledger, scratch, storage, stored
from infra.config import to_json
from infra.digests import digest
from infra.errors import DataError
from infra.repository import REPOSITORY
from infra.run_folder import RunFolder
from infra.stored import Seconds, Stored
from train.config import DalleFit, DvaeFit, RunConfig
from train.config_align import CONTRAST_COST
from train.run.stage_table import used_by

PROBE_S = 8.0
"""Seconds of measured updates, for the dVAE and the transformer together, in as many processes as the demo uses."""
_KEPT = "probe.json"
_KEPT_S = 900.0
"""A probe counts for so long: whoever starts a stopped demo again does not wait for another one."""
_TRAININGS = ("dvae", "dalle")
_REFERENCE_RATES = {"dvae": 114.0, "dalle": 82.0}
"""Samples/s of the demo's trainings on the machine on which the figures below were recorded: two cores of an AMD EPYC, two processes."""
_LOADING = 0.03
"""Waiting for batches, as a fraction of the time of updates (5.6 of 158 s in the dVAE's training, 1 % in the transformer's)."""
_EVALUATION = 0.5
"""Time of an evaluated sample divided by that of a trained one: two forward passes, on larger batches, instead of the arithmetic of three."""
_SAVE_S = 0.15
_QUIET_SHARE = 0.9
"""The fraction of its cores' time that a process of the probe uses on an idle machine; the rest is spent waiting for the other process."""
_BUSY = 1.25
"""If the time under the present load is at least this many times that on an idle machine, the projection is a range."""
_TELLING_S = 20.0
_PROBE_COUNTS_S = 120.0
"""A probe on an idle machine counts as a stage of so many seconds that took what was projected: a load that one stage met may be gone in the next."""
_MOST_OFF = 1.5
"""The ends of a range are at most this factor away from its middle."""
_START_S = 5.0
"""Seconds that a stage's launcher takes before it starts ranks."""
_CLIP_IMAGES_S, _PICTURES_S = 600.0, 10.0
_FEATURES_S = 500.0
"""Seconds for one view of the demo's pictures and their captions through the frozen towers (clip.towers = "frozen")."""
_OTHER_S = {"prepare": 14.0, "tokenizer": 1.0, "encode": 15.0, "evaluate": 4.0, "report": 2.0}
"""Recorded seconds of the other stages with the demo's data, without the starts of processes."""


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Projection:
    """The time that the unfinished stages will take: a range if other programs use this machine. It is corrected by the time that each stage then took.

    Args:
        quiet: seconds of each stage if no other program used the machine.
        loaded: seconds of each stage under the present load.
        words: text to show instead, if nothing was measured.
    """

    def __init__(self, quiet: Mapping[str, float], loaded: Mapping[str, float], words: str = "") -> None:
        self.quiet, self.loaded, self._words = dict(quiet), dict(loaded), words
        self._told: list[tuple[float, float]] = []
        """(seconds taken, seconds projected) of each finished stage that was long enough to tell the speed of the machine."""
        self._probe = [(_PROBE_COUNTS_S, _PROBE_COUNTS_S)] if sum(loaded.values()) <= _BUSY * sum(quiet.values()) else []

    def __str__(self) -> str:
        if self._words:
            return f"projected time: {self._words}"
        low, high = sum(self.quiet.values()), sum(self.loaded.values())
        trainings = [name for name in _TRAININGS if name in self.loaded]
        parts = ", ".join(f"{name} {self.loaded[name] / 60:.1f}" for name in trainings)
        parts = f"({parts}, the rest {(high - sum(self.loaded[name] for name in trainings)) / 60:.1f})"
        if high <= _BUSY * low:
            return f"projected time: {high / 60:.0f} minutes {parts}, while this machine stays as free as it is; measured again after each stage"
        return (
            f"projected time: {low / 60:.0f} to {high / 60:.0f} minutes {parts}: other programs take {100 * (1 - low / high):.0f} % of this machine now; "
            "measured again after each stage"
        )

    def took(self, stage: str, seconds: float) -> None:
        """Take note of the time that a stage took. Short stages are ignored, because they consist mostly of starts of processes."""
        middle = self._middle(stage)
        if middle and seconds >= _TELLING_S:
            self._told.append((seconds, middle))
        self.quiet.pop(stage, None)
        self.loaded.pop(stage, None)

    def to_go_s(self) -> tuple[float, float] | None:
        """Least and most seconds that are left, or None before a stage of some length has ended.

        The projection is scaled by the time that the probe and all ended stages took, divided by their projected time, so that long stages count more than short ones.
        The range is as wide as they differ in this factor.
        """
        if not self._told:
            return None
        told = [*self._probe, *self._told]
        pace = sum(taken for taken, _ in told) / sum(middle for _, middle in told)
        paces = [taken / middle for taken, middle in told]
        off = min(_MOST_OFF, max(max(paces) / pace, pace / min(paces)))
        left = pace * sum(map(self._middle, self.loaded))
        return left / off, left * off

    def to_go(self) -> str:
        """', about 13 minutes to go', or a range of minutes; '' before a stage of some length has ended."""
        found = self.to_go_s()
        if found is None:
            return ""
        low, high = (max(1, round(seconds / 60)) for seconds in found)
        if high <= 1:
            return ", about a minute to go"
        minutes = f"{low} to {high}" if high > _BUSY * low else f"{round(math.sqrt(low * high))}"
        return f", about {minutes} minutes to go"

    def _middle(self, stage: str) -> float:
        return math.sqrt(self.quiet.get(stage, 0.0) * self.loaded.get(stage, 0.0))


def project(cfg: RunConfig, run: RunFolder, nproc: int) -> Projection:
    """Measure updates of both networks in ``nproc`` processes, and project how long the unfinished stages will take."""
    trainings = [name for name in _TRAININGS if run.done(name) is None]
    if not trainings:
        aligning = _align_s(cfg) if run.done("align") is None else 0.0
        return Projection({}, {}, f"{_minutes(aligning)} (both trainings are finished)")
    of = digest([to_json(cfg), nproc, socket.gethostname()])
    measured = _kept(run, of, trainings)
    if measured is None:
        print(f"probing this machine for about {PROBE_S + 14:.0f} seconds ...", flush=True)
        measured = probe(run, nproc, trainings)
        if measured is not None:
            rates, start_s, share = measured
            storage.write_json(run.at(_KEPT), {"of": of, "at": time.time(), "rates": rates, "start_s": start_s, "share": share})
    if measured is None:
        return Projection({}, {}, "unknown, because the probe failed (see above); the stages may fail likewise")
    rates, start_s, share = measured
    done = {name: _steps_done(run, name) for name in trainings}
    others = [name for name in used_by(cfg) if name not in _TRAININGS and run.done(name) is None]
    quiet = estimate(cfg, {name: rate / share for name, rate in rates.items()}, start_s * share, done, others)
    return Projection(quiet, estimate(cfg, rates, start_s, done, others), "")


class _Probe(Stored):
    """probe.json."""

    of: str
    at: Seconds
    rates: dict[str, Rate]
    start_s: Seconds
    share: Rate


def _kept(run: RunFolder, of: str, trainings: list[str]) -> tuple[dict[str, float], float, float] | None:
    """A recent probe of the same configuration on the same machine, if it measured these trainings."""
    try:
        found = stored.read_if_there(run.at(_KEPT), _Probe)
    except DataError:
        return None  # it is measured again
    if found is None or found["of"] != of or not 0 <= time.time() - found["at"] < _KEPT_S or not set(trainings) <= set(found["rates"]):
        return None
    return {name: found["rates"][name] for name in trainings}, found["start_s"], found["share"]


def _minutes(aligning_s: float) -> str:
    """Of what comes after both trainings, on the machine of the recorded rates."""
    return f"about {3 + aligning_s / 60:.0f} minutes" if aligning_s > _TELLING_S else "two or three minutes"


def estimate(cfg: RunConfig, rates: Mapping[str, float], start_s: float, done: Mapping[str, int], others: list[str]) -> dict[str, float]:
    """Seconds of each unfinished stage.

    Args:
        rates: samples/s of the unfinished trainings, summed over all processes.
        start_s: seconds from the start of a rank to its first update.
        done: number of updates of these trainings that are already saved.
        others: the other unfinished stages.
    """
    found = {}
    for name, rate in rates.items():
        fit = cfg.dvae_fit if name == "dvae" else cfg.dalle_fit
        found[name] = _START_S + start_s + _training(fit, rate, fit.steps - done[name])
    speed = sum(rate / _REFERENCE_RATES[name] for name, rate in rates.items()) / len(rates)
    work = _OTHER_S | {
        "align": _align_s(cfg),
        "clip": _clip_s(cfg),
        "generate": cfg.generate.candidates * (cfg.generate.num_captions + cfg.generate.num_known_captions) / _PICTURES_S,
    }
    for name in others:
        ranks_s = 0.0 if name in ("prepare", "tokenizer", "report") else start_s
        found[name] = (0.0 if name == "report" else _START_S) + ranks_s + work[name] / speed
    return found


def _clip_s(cfg: RunConfig) -> float:
    """Seconds of stage clip; one update of heads alone is next to nothing."""
    return _FEATURES_S * cfg.clip_fit.views if cfg.clip.towers == "frozen" else cfg.clip_fit.steps * cfg.clip_fit.batch / _CLIP_IMAGES_S


def _align_s(cfg: RunConfig) -> float:
    """Seconds of stage align, on the machine of the recorded rates."""
    if cfg.transformer != "align":
        return 0.0
    fit = cfg.fit("align")
    assert isinstance(fit, DalleFit)
    return _training(fit, _REFERENCE_RATES["dalle"] / CONTRAST_COST, fit.steps)


def _training(fit: DvaeFit | DalleFit, rate: float, steps: int) -> float:
    """Seconds from the first to the last update."""
    evaluated = -(-steps // fit.eval_every) * fit.eval_samples * _EVALUATION
    return (steps * fit.batch * (1 + _LOADING) + evaluated) / rate + -(-steps // fit.save_every) * _SAVE_S


def probe(run: RunFolder, nproc: int, trainings: list[str]) -> tuple[dict[str, float], float, float] | None:
    """Samples/s of the trainings, summed over ``nproc`` processes; seconds from the start of a process to its first update; and the CPU time that a process got, as a
    fraction of what it gets on an idle machine. None if a process failed."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // nproc))
    with scratch.folder("probe-") as room:
        command = [sys.executable, "-m", "train.planning.demo_time_probe", run.config_url, room, str(PROBE_S / len(trainings)), *trainings]
        base = os.environ | {"OMP_NUM_THREADS": threads, "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(
                command,
                env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=REPOSITORY,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(nproc)
        ]
        said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        return None
    answers = [json.loads(text.splitlines()[-1]) for text in said]
    share = min(1.0, sum(answer["cpu_share"] for answer in answers) / len(answers) / _QUIET_SHARE)
    return {name: answers[0][name] for name in trainings}, max(answer["start_s"] for answer in answers), share


def _steps_done(run: RunFolder, name: str) -> int:
    """The number of updates in the newest complete checkpoint."""
    return max(0, ledger.newest_checkpoint(run, name))
