"""A collective that never returns ends in bounded time, with the rank and the place named: one thread in each rank that waits for beats."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from infra.errors import ExitCode
from infra.run_folder import REPOSITORY

LIMIT_S = 540.0
"""Seconds without a beat. Below the process group's own timeout (600 s), which would end a rank without saying where it stood."""


class Watchdog:
    """Ends this process when nothing has beaten for too long; sleeps until the first beat.

    Args:
        limit_s: seconds that may pass between two beats.
        report: called with the exit code and the reason, before the process ends.
        end: how the process ends; ``os._exit``, since nothing else leaves a stuck collective.
    """

    def __init__(self, limit_s: float, report: Callable[[int, str], None], end: Callable[[int], object] = os._exit) -> None:
        self.limit_s = limit_s
        self._report, self._end = report, end
        self._due: float | None = None
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, patience: float = 1.0) -> None:
        """Something happened; the next beat may take ``patience`` times the limit (evaluations and saves are longer than steps)."""
        self._due = time.monotonic() + self.limit_s * patience

    def rest(self) -> None:
        """Nothing is expected any more."""
        self._due = None

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.limit_s / 10))
            due = self._due
            if due is not None and time.monotonic() > due:
                reason = f"no progress for {self.limit_s:.0f} s; it stands at {self.place()}"
                faulthandler.dump_traceback(sys.stderr)
                self._report(ExitCode.CRASH, reason)
                self._end(ExitCode.CRASH)
                return

    def place(self) -> str:
        """Where the main thread stands: the innermost line of ours, and what it called."""
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        ours = [frame for frame in stack if frame.filename.startswith(str(REPOSITORY))]
        inner = (ours or stack)[-1]
        name = inner.filename.removeprefix(f"{REPOSITORY}/")
        called = f", inside {stack[-1].name} ({os.path.basename(stack[-1].filename)})" if stack[-1] is not inner else ""
        return f"{name}:{inner.lineno} in {inner.name}{called}"


_current: list[Watchdog] = []


def start(report: Callable[[int, str], None]) -> None:
    """Watch this rank from its first beat on. LAUNCHER_HANG_S replaces LIMIT_S."""
    _current[:] = [Watchdog(float(os.environ.get("LAUNCHER_HANG_S") or LIMIT_S), report)]


def beat(patience: float = 1.0) -> None:
    """Beat this rank's watchdog, if it has one."""
    for watchdog in _current:
        watchdog.beat(patience)


def rest() -> None:
    """Let this rank's watchdog sleep until the next beat."""
    for watchdog in _current:
        watchdog.rest()
