"""The processes of a run, as the kernel lists them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path


def of_run(run: Path) -> list[int]:
    """Live launchers and ranks of a run folder, and what they have forked."""
    mark = f"run.root={run.parent}"
    return [pid for pid, (_, words) in _launchers().items() if any(str(run) in word or word == mark for word in words)]


def ranks_of(run: Path) -> list[int]:
    """Live ranks of a run folder, in the order of their start."""
    return sorted(set(_ranks()) & set(of_run(run)))


def ranks_under(launcher: int) -> list[int]:
    """Live ranks of a launcher's process, in the order of their start."""
    return sorted(pid for pid, parent in _ranks().items() if parent == launcher)


def alive(pid: int) -> bool:
    """Whether a process has not ended. One that nobody has waited for yet has."""
    try:
        return stat(pid)[0] not in (b"Z", b"X")
    except OSError:
        return False


def stat(pid: int) -> list[bytes]:
    """What the kernel says of a process, from its state and its parent on. Bytes: the name before them may be cut within a character.

    Raises:
        OSError: it is gone.
    """
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()


def _ranks() -> dict[int, int]:
    """Ranks and their parents. What a rank forks shows the rank's command line, until it becomes another program: it is none."""
    workers = {pid: parent for pid, (parent, words) in _launchers().items() if "--worker" in words}
    return {pid: parent for pid, parent in workers.items() if parent not in workers}


def _launchers() -> dict[int, tuple[int, list[str]]]:
    return {pid: (parent, words) for pid, parent, words in _all() if any("launcher.py" in word for word in words)}


def _all() -> Iterator[tuple[int, int, list[str]]]:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            parent = int(stat(int(entry.name))[1])
        except OSError:
            continue  # it has ended
        yield int(entry.name), parent, words


@contextlib.contextmanager
def throttled(processes: list[int], pause_s: float) -> Iterator[None]:
    """Let processes work for 30 ms after every ``pause_s``: a twentieth of their speed, so that they are not done before SLURM misses their node; or not at all."""
    over = threading.Event()

    def throttle() -> None:
        while not over.is_set():
            for number, seconds in ((signal.SIGSTOP, pause_s), (signal.SIGCONT, 0.03)):
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, number)
                over.wait(seconds)

    thread = threading.Thread(target=throttle)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def inner(pid: int) -> int:
    """A process's number in its own space of numbers, as it writes it down."""
    found = re.search(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(found[1]) if found else -1
