"""Signals that ask a run to stop, and the tie that ends a child with its parent (docs/contracts.md, section 1)."""

import ctypes
import os
import signal
import threading
from collections.abc import Sequence
from functools import cache
from types import FrameType

from infra import environment

PREEMPTION_SIGNAL = signal.SIGUSR2  # not USR1: NCCL may use it
_IGNORED = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup ignores SIGHUP before it starts us, and children inherit that
STOP_SIGNALS = (PREEMPTION_SIGNAL, signal.SIGTERM, signal.SIGINT, *(() if _IGNORED else (signal.SIGHUP,)))
"""SIGHUP, which a terminal sends as it closes, stops like SIGTERM, and nothing where it was ignored at the start."""
SHUTDOWN_S = 600
"""Seconds that ranks get to finish a step and save before the agent kills them."""

_PR_SET_PDEATHSIG = 1


class StopFlag:
    """Set by the first stop signal; read at step and part boundaries."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: only sets the flag."""
        self.received = signal.Signals(number)


def install(flag: StopFlag | None = None) -> StopFlag:
    """Let stop signals set a flag (a new one if none is given), then deliver those that waited (see ``block_in_children``).

    SLURM sends the preemption signal to every process of a step, a closing terminal SIGHUP to every one in its foreground, helpers of libraries included,
    which they would kill: children get both blocked.
    """
    flag = StopFlag() if flag is None else flag  # one that is not set is false
    for number in STOP_SIGNALS:
        signal.signal(number, flag.handle)
    _hear_for_children((PREEMPTION_SIGNAL, signal.SIGHUP))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOP_SIGNALS) - {PREEMPTION_SIGNAL, signal.SIGHUP})
    return flag


def block_in_children() -> None:
    """Block all stop signals in this (the main) thread, so that children start with them blocked, while this process still hears them.

    The mask of the spawning thread is inherited through exec: a signal that arrives before a child has its handler stays pending until
    ``install`` unblocks it.
    """
    _hear_for_children(STOP_SIGNALS)


def _hear_for_children(numbers: Sequence[signal.Signals]) -> None:
    """Block signals in the main thread, whose mask children inherit. A helper thread keeps them deliverable here; Python runs handlers in the main
    thread whichever thread receives."""
    _listener(tuple(numbers))
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


@cache
def _listener(numbers: tuple[signal.Signals, ...]) -> threading.Thread:
    """The thread in which these signals are never blocked: one for a process, however often its ranks are started."""
    ready = threading.Event()

    def listen() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        ready.set()
        threading.Event().wait()

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    ready.wait()
    return thread


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when the parent ends, so that ``kill -9`` of a launcher leaves no rank behind.

    Args:
        parent: its number, by which one that ended before this call is noticed; LAUNCHER_PID by default.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = parent or environment.whole("LAUNCHER_PID", 0)
    if expected and os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)
