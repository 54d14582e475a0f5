"""How much of a long run is work where machines fail: the interval between saves by Young and Daly, the share of useful time by formula, and by a seeded simulation.
Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np


@dataclass(frozen=True)
class Job:
    """What of a job matters here, in seconds."""

    between_failures: float
    """Mean time between failures of all its machines together."""
    stall: float
    """What training waits for a save."""
    write: float
    """From the beginning of a save until it is complete; training goes on meanwhile, and a failure before loses it."""
    restart: float
    """From a failure to the first update after it."""


def young(job: Job) -> float:
    """Young's interval (1974): seconds of work between two saves, where failures are rare."""
    return math.sqrt(2 * job.stall * job.between_failures)


def daly(job: Job) -> float:
    """Daly's estimate of higher order (2006)."""
    share = job.stall / (2 * job.between_failures)
    if share >= 1:
        return job.between_failures
    return young(job) * (1 + math.sqrt(share) / 3 + share / 9) - job.stall


def interval(job: Job) -> float:
    """Seconds of work between saves that serve the job best: Daly's, and no shorter than a save takes to write, because they come one at a time."""
    return max(daly(job), job.write)


def expected(job: Job, work: float) -> float:
    """The share of time that is useful work, to first order: of each stretch between failures a restart, half an interval and a write are lost.

    Args:
        work: seconds of work between saves.
    """
    lost = job.restart + (work + job.stall) / 2 + job.write
    return max(0.0, (1 - job.stall / (work + job.stall)) * (1 - lost / (job.between_failures + job.restart)))


def simulate(job: Job, work: float, horizon: float, seed: int) -> float:
    """The share of useful work in one run of ``horizon`` seconds. Failures come at random at a constant rate, during restarts too; work counts once a complete
    save holds it, and at the end of the run."""
    rng = np.random.default_rng(seed)
    now = useful = 0.0
    lap = work + job.stall
    while now < horizon:
        up = float(rng.exponential(job.between_failures)) - job.restart
        if up <= 0:
            now += up + job.restart  # struck again before it was up
            continue
        now += job.restart
        if now + up >= horizon:
            left = max(0.0, horizon - now)
            return (useful + work * (left // lap) + min(work, left % lap)) / horizon
        useful += work * max(0, math.floor((up - job.write) / lap))
        now += up
    return useful / horizon


def simulated(job: Job, work: float, horizon: float, seeds: int) -> tuple[float, float]:
    """Mean over seeds, and its standard error."""
    found = [simulate(job, work, horizon, seed) for seed in range(seeds)]
    return mean(found), stdev(found) / math.sqrt(seeds)
