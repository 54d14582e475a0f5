"""Signs of life of a rank: what it is at, left on its node, from where its launcher brings it to the run folder (``infra/listening.py``).

A rank writes a few hundred bytes to a file on its node, no oftener than every LEAST_S: nobody waits for a storage in a training loop. A thread beside the loop
touches the file: it ages with a process that is stopped, and not with one that waits for others.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from infra import environment

LEAST_S = 0.1
"""Seconds between two words of a rank that came as often as its updates."""
VARIABLE = "LAUNCHER_LIVE"
"""Names the folder on this node to ranks."""
_TIMES = 5
_QUIET_S = 3.0
"""An update may take _TIMES as long as usual, and so many seconds in any case, before the speed of those before it says nothing of now."""

Facts = dict[str, Any]


class _Mark:
    """This process's file."""

    def __init__(self, folder: str, rank: int) -> None:
        self._file = os.open(Path(folder, f"rank-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._facts: Facts = {"rank": rank, "pid": os.getpid()}
        self._due, self._longest = 0.0, 0

    def say(self, facts: Facts, *, now: bool) -> None:
        self._facts |= facts
        clock = time.monotonic()
        if now or clock >= self._due:
            self._due = clock + LEAST_S
            self._facts["time"] = time.time()
            # In place, in one write: a file that takes another's place is brought to disk first by some file systems, which takes milliseconds.
            text = json.dumps(self._facts).encode()
            self._longest = max(self._longest, len(text))
            with contextlib.suppress(OSError):  # a node without room: nobody hears of this rank, which works all the same
                os.pwrite(self._file, text.ljust(self._longest), 0)

    def beat(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def close(self) -> None:
        file, self._file = self._file, -1  # the thread that touches it may be about to
        os.close(file)


_mine: list[_Mark] = []


def begin(rank: int) -> None:
    """From here on this process is a rank whose launcher listens, if it does."""
    end()
    folder = environment.text(VARIABLE)
    _mine[:] = [_Mark(folder, rank)] if folder else []
    say(now=True, phase="the start")


def end() -> None:
    """Nothing more is said."""
    while _mine:
        _mine.pop().close()


def say(*, now: bool = False, **facts: Any) -> None:
    """Say what this rank is at; what was said before stays until it is replaced. Nothing happens outside of ranks.

    Args:
        now: also where something was said a moment ago.
        facts: JSON values.
    """
    for mark in _mine:
        mark.say(facts, now=now)


def beat() -> None:
    """This process runs, whatever it waits for: to be called by a thread."""
    for mark in _mine:
        mark.beat()


def quiet_s(facts: Facts, age_s: float = 0.0) -> float | None:
    """Seconds since a rank made progress, where that is longer than its own pace explains: the speed that it said is of then. None while progress comes.

    Args:
        facts: what it said last, as its launcher brought it.
        age_s: seconds since its launcher did.
    """
    said_s, rate = float(facts.get("said_s") or 0.0), float(facts.get("rate") or 0.0)
    usual_s = float(facts.get("usual_s") or 0.0) or (1 / rate if rate else 0.0)
    return said_s + age_s if usual_s and said_s > max(_QUIET_S, _TIMES * usual_s) else None
