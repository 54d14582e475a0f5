"""Where an attempt's time went: one line at its end, and the same figures among the metrics (goodput/...)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from infra import ledger, stored
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from infra.run_records import Begin, End
from train.loop.metrics import newest_attempt_times

NAMES = ("init", "data", "step", "evaluate", "save", "lost")


def process_age_s() -> float:
    """Seconds since this process started."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float(uptime.read().split()[0]) - started)


class Goodput:
    """Seconds by name. ``init`` is all before the first update, ``lost`` what an earlier attempt did after its last checkpoint."""

    def __init__(self, lost_s: float = 0.0, age_s: float = 0.0) -> None:
        self.seconds = dict.fromkeys(NAMES, 0.0) | {"init": age_s, "lost": lost_s}

    def add(self, name: str, seconds: float) -> None:
        """Count seconds under one of NAMES."""
        self.seconds[name] += seconds

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    @property
    def share(self) -> float:
        """Share of the time that moved the training on: steps, of all."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def line(self, stage: str) -> str:
        """For people: ``dvae: goodput 83 %: init 4.1 s, data 0.2 s, ...``."""
        return f"{stage}: goodput {100 * self.share:.0f} %: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())

    def metrics(self) -> dict[str, float]:
        """For the metrics."""
        return {f"goodput/{name}_s": seconds for name, seconds in self.seconds.items()} | {"goodput/share": self.share}


def lost_s(run_url: str, stage: str, step: int) -> float:
    """Seconds that the attempt before this one spent after update ``step``, where this one starts again: by its metrics, and by when it crashed.

    A crash tells of the time in which a hung rank was waited for, and on s3 of the updates whose lines were not yet uploaded.
    """
    times = newest_attempt_times(run_url, stage)
    if not times:
        return 0.0
    ended = max(max(times.values()), _crashed(run_url, stage, max(times.values())))
    kept = [when for at, when in times.items() if at <= step]
    return ended - (max(kept) if kept else min(times.values()))


def _crashed(run_url: str, stage: str, logged: float) -> float:
    """When the last rank of the newest attempt with records crashed; 0 if none did, or if it is not the attempt that logged until ``logged``."""
    run = RunFolder(run_url)
    for number in reversed(run.attempts(stage)):
        end = stored.read_if_there(run.attempt_url(stage, number, "end.json"), End)
        if end is None:
            records = run.records(stage, number)
            end = ledger.ending(ExitCode.CRASH, "", records) | {"code": records[0]["code"]} if records else None
        if end is None or (end["code"] == ExitCode.CRASH and not end.get("ended")):
            continue  # it goes on, or its ranks were killed
        begin = stored.read_if_there(run.attempt_url(stage, number, "begin.json"), Begin)
        if begin is None or begin.get("time", 0.0) > logged:
            return 0.0
        return float(end.get("ended", 0.0))
    return 0.0
