"""Handling of signals that ask a run to stop; and children that end with their parent (docs/contracts.md, section 1)."""

import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType

from infra import environment, live
from infra.errors import StopRequested

log = logging.getLogger(__name__)

PREEMPTION_SIGNAL = signal.SIGUSR2  # not USR1: NCCL may use it
_IGNORED = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup ignores SIGHUP before it starts us, and children inherit that
STOP_SIGNALS = (PREEMPTION_SIGNAL, signal.SIGTERM, signal.SIGINT, *(() if _IGNORED else (signal.SIGHUP,)))
"""A closing terminal sends SIGHUP, which stops like SIGTERM, unless it was ignored when this process started."""
SHUTDOWN_S = 600
"""Seconds that ranks get to finish a step and save before the agent kills them."""

PATIENCE_S = 5.0
"""Seconds that a process which has nothing to lose gets to hear a stop signal."""
_AGAIN_S = 0.5
_PR_SET_PDEATHSIG = 1


class StopFlag:
    """A flag that the first stop signal sets; training reads it between steps, other work between parts.

    In a phase in which the process has declared that it has nothing to save (``phase``), the signal ends the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.name = ""
        """Of the phase that a signal ends at once; '' where work is under way that is saved first."""
        self.ended = ""
        """The phase that a signal has ended, once: a library may have made another error of that."""
        self.struck = ""
        """What was under way when the first signal came, for people."""
        self._doing = "the start of the process"
        self._since = 0.0
        self._patient = self._insisting = False

    def __bool__(self) -> bool:
        return self.received is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: sets the flag.

        Raises:
            StopRequested: in a phase that has nothing to save.
        """
        if self.received is None:
            self._since, self.struck = time.monotonic(), self._doing
        self.received = signal.Signals(number)
        self._end_if_idle()

    def phase(self, name: str, *, patient: bool = False, insisting: bool = False) -> None:
        """From here on nothing is lost if this process ends: what it makes now is made again by the next start. To be called in the main thread.

        Args:
            patient: what is made may be saved within PATIENCE_S; only then does the signal end it.
            insisting: libraries at work here catch whatever is raised (optional imports, compilers): it is raised again and again until the phase is left.

        Raises:
            StopRequested: the signal has come already.
        """
        self.doing(name)
        self.name, self.ended, self._patient, self._insisting = name, "", patient, insisting
        live.say(now=True, phase=name)
        if self.received is not None:
            self._end_if_idle()

    def orderly(self, name: str) -> None:
        """From here on work is under way that a stop must save, or leave at a boundary: the flag is only set."""
        if self.name:
            live.say(now=True, phase="")
        self.doing(name)
        self.name = self.ended = ""

    def doing(self, name: str) -> None:
        """What is under way from here on, whatever a signal does to it. LAUNCHER_DEBUG shows it."""
        if name != self._doing:
            self._doing = name
            log.debug("begins: %s", name)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """For the block, something other than updates is under way: ``doing`` says so here, and the signs of life to those who watch."""
        before = self._doing
        self.doing(name)
        live.say(now=True, phase=name)
        try:
            yield
        finally:
            live.say(now=True, phase="")
            self.doing(before)

    @contextmanager
    def watched(self, end: Callable[[str], object], patience_s: float = PATIENCE_S / 2) -> Iterator[None]:
        """For the block, end this process also where it hears no signal: a library that waits for a rank which has just ended so waits for minutes, and
        Python's handlers run once it returns. To be called in the main thread.

        Args:
            end: called with the reason, in another thread; ends the process.
            patience_s: what a signal gets to be heard; a patient phase gets PATIENCE_S more.
        """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

        def watch() -> None:
            while number := os.read(reader, 1):
                waits_s = patience_s + (PATIENCE_S if self._patient else 0.0)
                if number[0] in STOP_SIGNALS and not done.wait(waits_s) and (phase := self.name):
                    end(f"stopped by {signal.Signals(number[0]).name} during {phase}; nothing was lost.")
            os.close(reader)

        done = threading.Event()
        threading.Thread(target=watch, name="stops", daemon=True).start()
        try:
            yield
        finally:
            done.set()
            signal.set_wakeup_fd(former)
            os.close(writer)

    def latency_s(self) -> float:
        """Seconds since the first stop signal."""
        return time.monotonic() - self._since

    def _end_if_idle(self) -> None:
        if not self.name or self.received is None:
            return
        if self._patient:
            self._again_after(PATIENCE_S)
        else:
            phase = self.name
            if self._insisting:
                self._again_after(_AGAIN_S)
            else:
                self.name, self.ended = "", phase  # once: what cleans up must not be struck again
            raise StopRequested(f"stopped by {self.received.name} during {phase}; nothing was lost.", at_once=True)

    def _again_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._again, args=(self.name,))
        timer.daemon = True
        timer.start()

    def _again(self, name: str) -> None:
        if self.name == name and self.received is not None:
            self._patient = False
            os.kill(os.getpid(), self.received)


def install(flag: StopFlag | None = None) -> StopFlag:
    """Let stop signals set a flag (a new one if none is given), then deliver those that are pending (see ``block_in_children``).

    SLURM sends the preemption signal to every process of a step, and a closing terminal sends SIGHUP to every process in its foreground. Both would kill
    helper processes of libraries, so children start with these two signals blocked.
    """
    flag = StopFlag() if flag is None else flag  # not "flag or ...": a flag that is not set is false
    for number in STOP_SIGNALS:
        signal.signal(number, flag.handle)
    _hear_for_children((PREEMPTION_SIGNAL, signal.SIGHUP))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(STOP_SIGNALS) - {PREEMPTION_SIGNAL, signal.SIGHUP})
    return flag


def block_in_children() -> None:
    """Block all stop signals in this (the main) thread, so that children start with them blocked, while this process still hears them.

    The signal mask of the spawning thread is inherited through exec: a signal that arrives before a child has installed its handler stays pending until the
    child's ``install`` unblocks it.
    """
    _hear_for_children(STOP_SIGNALS)


def _hear_for_children(numbers: Sequence[signal.Signals]) -> None:
    """Block signals in the main thread, whose mask children inherit, and keep a helper thread that still receives them. Python runs handlers in the main
    thread, whichever thread receives the signal."""
    _listener(tuple(numbers))
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


@cache
def _listener(numbers: tuple[signal.Signals, ...]) -> threading.Thread:
    """The thread in which these signals are never blocked: one in a process, however often its ranks are started."""
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
        parent: its process id, to notice a parent that ended before this call; LAUNCHER_PID by default.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    expected = parent or environment.whole("LAUNCHER_PID", 0)
    if expected and os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)
