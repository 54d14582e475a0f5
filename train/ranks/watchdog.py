"""Ends a rank that makes no progress, for example in a collective that never returns, and reports the rank and the line. One thread in each rank waits for
beats.

A rank that waits for others is given a little longer than the others, so that the rank which delays them ends first and reports where it was. A rank that
cannot report anything, because it was stopped or hangs in the kernel, is named by the other ranks of its node, and ended by its launcher.
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
"""Seconds without a beat. Less than the process group's timeout (600 s), which would end a rank without a report of where it was."""

STACK_SIGNAL = signal.SIGQUIT
"""Makes a rank print all its stacks and continue. Sent with ``kill -QUIT``, or by another rank of the node that has waited for too long."""
_WAITING = ["/torch/distributed/", "/torch/autograd/"]
"""A rank whose innermost frame is in one of these files waits for other ranks: in a collective, or in a backward pass that contains one. Modules of ours are
added by ``waits_for_ranks``."""
_SAVERS: list[str] = []
"""Modules whose code waits for the thread that writes checkpoints (see ``waits_for_saver``)."""
SAVER_THREAD = "checkpoint"
"""Name of that thread, which writes this rank's part of a checkpoint and waits for those of the other ranks."""
_PEERS_S = 60.0
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "stuck in the kernel", "Z": "dead"}


def waits_for_ranks(file: str) -> None:
    """A module calls this with its ``__file__`` to declare: a rank whose innermost frame is in this file waits for other ranks."""
    _WAITING.append(file)


def waits_for_saver(file: str) -> None:
    """A module calls this with its ``__file__`` to declare: a rank that is in this file waits for the thread that writes checkpoints."""
    _SAVERS.append(file)


class Watchdog:
    """Ends this process if no beat has come for too long. Does nothing until the first beat.

    Args:
        limit_s: seconds that may pass between two beats.
        report: called with the exit code and the reason, before the process ends.
        end: ends the process. By default ``os._exit``, because nothing else gets a process out of a collective that hangs.
    """

    def __init__(self, limit_s: float, report: Callable[[int, str], None], end: Callable[[int], object] = os._exit) -> None:
        self.limit_s = limit_s
        self._report, self._end = report, end
        self._due: float | None = None
        self._lock = threading.Lock()
        self._main = threading.get_ident()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, patience: float = 1.0) -> None:
        """Report progress. The next beat may come after ``patience`` times the limit: evaluations and saves take longer than steps."""
        with self._lock:
            self._due = time.monotonic() + self.limit_s * patience

    def rest(self) -> None:
        """Expect no beat until the next one comes."""
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
                if now - slept > tick + self.limit_s / 2:  # the whole process was suspended, so the work had no time to make progress
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
        if _innermost_of_ours(stack).filename in _SAVERS:  # the main thread waits for the saver, which may be writing, or waiting for other ranks
            frames = sys._current_frames()
            savers = [
                frames[thread.ident] for thread in threading.enumerate() if thread.name.startswith(f"{SAVER_THREAD}_") and thread.ident in frames
            ]
            return any(_is_waiting(traceback.extract_stack(frame)[-1].filename) for frame in savers)
        return _is_waiting(stack[-1].filename)

    def place(self) -> str:
        """Where the main thread is: the innermost line of this repository, and the function that it has called."""
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
    """Whether a file belongs to this repository, and not to a Python environment inside it."""
    return filename.startswith(f"{REPOSITORY}/") and "/site-packages/" not in filename


def suspects() -> list[str]:
    """Describe the ranks of this node that cannot continue, judging by the state of their process; ask all of them to print their stacks."""
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
        except OSError:  # the process has ended meanwhile
            continue
        if state in _STATES:
            found.append(f"rank {variables.get(b'RANK', b'?').decode()} (process {entry.name}) is {_STATES[state]}")
    return sorted(found)


_current: list[Watchdog] = []


def start(report: Callable[[int, str], None]) -> None:
    """Create this rank's watchdog, which waits for the first beat. The environment variable LAUNCHER_HANG_S replaces LIMIT_S."""
    faulthandler.register(STACK_SIGNAL)
    _current[:] = [Watchdog(environment.seconds("LAUNCHER_HANG_S", LIMIT_S), report)]


def beat(patience: float = 1.0) -> None:
    """Beat this rank's watchdog, if it has one."""
    for watchdog in _current:
        watchdog.beat(patience)


def rest() -> None:
    """Let this rank's watchdog, if it has one, expect nothing until the next beat."""
    for watchdog in _current:
        watchdog.rest()


@contextmanager
def expecting(patience: float) -> Iterator[None]:
    """For a block that may take ``patience`` times the limit. After it, no beat is expected until the next one comes."""
    beat(patience)
    try:
        yield
    finally:
        rest()
