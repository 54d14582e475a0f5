"""What an attempt spent its time on: printed as one line when it ends, and logged as metrics (goodput/...)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infra import ledger
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from train.loop.metrics import newest_attempt_times

NAMES = ("init", "data", "step", "evaluate", "save", "lost")


def process_age_s() -> float:
    """Seconds since this process started."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(uptime.read().split()[0]) - started)


class Goodput:
    """Seconds by name. ``init`` is the time before the first update; ``lost`` is the time of the previous attempt after its last checkpoint."""

    def __init__(self, lost_s: float = 0.0, age_s: float = 0.0) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0) | {"init": age_s, "lost": lost_s}

    def add(self, name: str, seconds: float) -> None:
        """Add seconds to one of NAMES."""
        self.seconds[name] += seconds

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time that a ``with`` block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    @property
    def share(self) -> float:
        """The fraction of the time that was spent on updates."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def line(self, stage: str) -> str:
        """The line to print: ``dvae: goodput 83 %: init 4.1 s, data 0.2 s, ...``."""
        return f"{stage}: goodput {100 * self.share:.0f} %: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())

    def metrics(self) -> dict[str, float]:
        """The same figures as metrics."""
        return {f"goodput/{name}_s": seconds for name, seconds in self.seconds.items()} | {"goodput/share": self.share}


def lost_s(run_url: str, stage: str, step: int) -> float:
    """Seconds that the previous attempt spent after update ``step``, from which this one resumes, according to its metrics and to when it crashed.

    The time of the crash adds what the metrics do not show: the wait for a hung rank, and on s3 the updates whose lines were not uploaded yet.
    """
    times = newest_attempt_times(run_url, stage)
    if not times:
        return 0.0
    ended = max(max(times.values()), _crashed(run_url, stage, max(times.values())))
    kept = [when for at, when in times.items() if at <= step]
    return ended - (max(kept) if kept else min(times.values()))


def _crashed(run_url: str, stage: str, logged: float) -> float:
    """When the last crashed rank of the attempt before this one ended; 0 if none crashed, or if that attempt began after the last line was logged."""
    for attempt in ledger.newest_first(RunFolder(run_url), stage):
        if attempt.code == ExitCode.CRASH and not attempt.ended:
            continue  # this attempt, which is still running, or one whose ranks were killed before they could write when they ended
        return attempt.ended if 0 < attempt.begun <= logged else 0.0
    return 0.0
