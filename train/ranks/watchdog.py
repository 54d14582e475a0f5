"""A collective that never returns ends in bounded time, with the rank and the place named: one thread in each rank that waits for beats.

A rank that waits for others gives them a little longer, so that the one which keeps them waiting ends first and says where it stood. One that cannot speak
(stopped, or stuck in the kernel) is named by those of its node, and ended by its launcher.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import environment, live, output
from infra.errors import ExitCode
from infra.repository import REPOSITORY

LIMIT_S = 540.0
"""Seconds without a beat. Below the process group's own timeout (600 s), which would end a rank without saying where it stood."""

STACK_SIGNAL = signal.SIGQUIT
"""Makes a rank print all its stacks and go on: ``kill -QUIT``, or another rank of the node that has waited for too long."""
_WAITING = ["/torch/distributed/", "/torch/autograd/"]
"""Where a rank stands that waits for others: in a collective, or in a backward pass that ends in one. Modules of ours add themselves (``waits_for_ranks``)."""
_SAVERS: list[str] = []
"""Modules whose code waits for the thread that writes checkpoints (``waits_for_saver``)."""
SAVER_THREAD = "checkpoint"
"""Its thread, which writes this rank's half of a checkpoint and waits for the others'."""
_PEERS_S = 60.0
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "stuck in the kernel", "Z": "dead"}


def waits_for_ranks(file: str) -> None:
    """A module says with its ``__file__``: a rank whose innermost frame is mine waits for other ranks."""
    _WAITING.append(file)


def waits_for_saver(file: str) -> None:
    """A module says with its ``__file__``: a rank that stands in me waits for the thread that writes checkpoints."""
    _SAVERS.append(file)


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
        self._lock = threading.Lock()
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, patience: float = 1.0) -> None:
        """Something happened; the next beat may take ``patience`` times the limit (evaluations and saves are longer than steps)."""
        with self._lock:
            self._due = time.monotonic() + self.limit_s * patience

    def rest(self) -> None:
        """Nothing is expected any more."""
        with self._lock:
            self._due = None

    def _watch(self) -> None:
        tick, peers_s = min(1.0, self.limit_s / 10), min(_PEERS_S, self.limit_s / 4)
        while True:
            slept = time.monotonic()
            time.sleep(tick)
            live.beat()
            with self._lock:
                now, due = time.monotonic(), self._due
                if due is None:
                    continue
                if now - slept > tick + self.limit_s / 2:  # the whole process was suspended, and so was what it is waited for
                    self._due = due + now - slept
                    continue
            if now > due + (peers_s if self._waits() else 0.0):
                self._say_and_end()
                return

    def _say_and_end(self) -> None:
        faulthandler.dump_traceback(sys.stderr)
        if (copy := output.copied_file()) is not None:  # faulthandler writes past what copies
            faulthandler.dump_traceback(copy)
        waits = self._waits()
        others = "; ".join(suspects()) if waits else ""
        verb = "it waits for other ranks at" if waits else "it stands at"
        reason = f"no progress for {self.limit_s:.0f} s; {verb} {self.place()}" + (f"; on this node {others}" if others else "")
        self._report(ExitCode.CRASH, reason)
        self._end(ExitCode.CRASH)

    def _stack(self) -> traceback.StackSummary:
        return traceback.extract_stack(sys._current_frames()[self._main])

    def _waits(self) -> bool:
        stack = self._stack()
        if _innermost_of_ours(stack).filename in _SAVERS:  # then its thread waits for others, or writes
            frames = sys._current_frames()
            savers = [
                frames[thread.ident] for thread in threading.enumerate() if thread.name.startswith(f"{SAVER_THREAD}_") and thread.ident in frames
            ]
            return any(_is_waiting(traceback.extract_stack(frame)[-1].filename) for frame in savers)
        return _is_waiting(stack[-1].filename)

    def place(self) -> str:
        """Where the main thread stands: the innermost line of ours, and what it called."""
        stack = self._stack()
        inner = _innermost_of_ours(stack)
        name = inner.filename.removeprefix(f"{REPOSITORY}/")
        called = f", inside {stack[-1].name} ({os.path.basename(stack[-1].filename)})" if stack[-1] is not inner else ""
        return f"{name}:{inner.lineno} in {inner.name}{called}"


def _is_waiting(filename: str) -> bool:
    return any(mark in filename for mark in _WAITING)


def _innermost_of_ours(stack: traceback.StackSummary) -> traceback.FrameSummary:
    return ([frame for frame in stack if _is_ours(frame.filename)] or stack)[-1]


def _is_ours(filename: str) -> bool:
    """Whether a file is of this repository, and not of an environment that lies in it."""
    return filename.startswith(f"{REPOSITORY}/") and "/site-packages/" not in filename


def suspects() -> list[str]:
    """Ranks of this node whose state says that they cannot go on; all others are asked for their stacks."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or int(entry.name) == os.getpid() or b"--worker" not in (entry / "cmdline").read_bytes().split(b"\0"):
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) != os.getppid():
                continue
            variables = dict(line.partition(b"=")[::2] for line in (entry / "environ").read_bytes().split(b"\0"))
            os.kill(int(entry.name), STACK_SIGNAL)
        except OSError:  # it has ended meanwhile
            continue
        if state in _STATES:
            found.append(f"rank {variables.get(b'RANK', b'?').decode()} (process {entry.name}) is {_STATES[state]}")
    return sorted(found)


_current: list[Watchdog] = []


def start(report: Callable[[int, str], None]) -> None:
    """Watch this rank from its first beat on. LAUNCHER_HANG_S replaces LIMIT_S."""
    faulthandler.register(STACK_SIGNAL)
    _current[:] = [Watchdog(environment.seconds("LAUNCHER_HANG_S", LIMIT_S), report)]


def beat(patience: float = 1.0) -> None:
    """Beat this rank's watchdog, if it has one."""
    for watchdog in _current:
        watchdog.beat(patience)


def rest() -> None:
    """Let this rank's watchdog sleep until the next beat."""
    for watchdog in _current:
        watchdog.rest()


@contextmanager
def expecting(patience: float) -> Iterator[None]:
    """One thing that may take ``patience`` times the limit; nothing is expected after it."""
    beat(patience)
    try:
        yield
    finally:
        rest()
