"""A launcher listens to its ranks (``infra/live.py``), and brings what they are at to the run folder, for whoever watches.

    <run>/live/<stage or share>/node-<n>.json                     how the ranks of a node stood when it was written (docs/contracts.md, section 10)
    <run>/logs/<stage or share>/attempt-<k>/rank-<r>.log          what they printed, where no scheduler keeps that

One object of each node every EVERY_S, however many ranks there are, and none by a rank.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from infra import environment, node_checks, output, run_records, scratch, shown, storage, stored
from infra.errors import DataError, ReportedError
from infra.job import Job
from infra.live import VARIABLE, Facts

log = logging.getLogger(__name__)

EVERY_S = 10.0
"""Seconds between two writes of a node; LAUNCHER_LIVE_S."""
_SOON_S = 1.0
_JOIN_S = 5.0
_LARGEST = 1 << 14  # bytes that are read of a rank's file
_TRIES = 5
_WORDS = 1 << 16  # bytes of its words that last lines are looked for in

Heard = Callable[[Facts], object]
"""Called with what rank 0 said last, whenever its node has written: for those who show it elsewhere."""


def place(run_url: str, label: str) -> str:
    """Folder of a stage's signs of life."""
    return storage.join(run_url, "live", label)


def logs(run_url: str, label: str, attempt: int) -> str:
    """Folder of what the ranks of an attempt printed, where no scheduler keeps that."""
    return storage.join(run_url, "logs", label, f"attempt-{attempt}")


@contextlib.contextmanager
def listening(run_url: str, label: str, attempt: int, job: Job, heard: Heard | None = None) -> Iterator[Path]:
    """Listen to this process and its children for the length of the block, and bring what they say to the run folder.

    Returns:
        The folder on this node that holds the ranks' words.
    """
    with scratch.folder("live-") as folder:
        before = environment.text(VARIABLE)
        os.environ[VARIABLE] = folder
        listener = _Listener(run_url, label, attempt, job, Path(folder), heard)
        try:
            yield Path(folder)
        finally:
            del os.environ[VARIABLE]
            if before:
                os.environ[VARIABLE] = before
            listener.close()


def copy_output(run_url: str, label: str, attempt: int, rank: int) -> None:
    """Keep a copy of what this rank prints: in the run folder where that is local and no scheduler has a log, else on this node, as long as its launcher lives."""
    folder = environment.text(VARIABLE)
    if not folder:
        return
    room = _room(run_url, label, attempt, Path(folder))
    with contextlib.suppress(OSError):
        room.mkdir(parents=True, exist_ok=True)
        output.copy_to(room / f"rank-{rank}.log")


def last_lines(run_url: str, label: str, attempt: int, folder: Path, ranks: Sequence[int], most: int) -> dict[int, list[str]]:
    """The last lines that ranks of this node printed, of those that printed any.

    Args:
        folder: what ``listening`` returned.
    """
    found = {}
    for rank in ranks:
        with contextlib.suppress(OSError):
            lines = output.tail(_room(run_url, label, attempt, folder) / f"rank-{rank}.log", _WORDS).decode(errors="replace").splitlines()
            found[rank] = [shown.message(line) for line in lines if line.strip()][-most:]
    return {rank: lines for rank, lines in found.items() if lines}


def _room(run_url: str, label: str, attempt: int, folder: Path) -> Path:
    keeps = not storage.is_remote(run_url) and not Job.from_env().id
    return storage.local_path(logs(run_url, label, attempt)) if keeps else folder


class _Listener:
    """The thread of a launcher."""

    def __init__(self, run_url: str, label: str, attempt: int, job: Job, folder: Path, heard: Heard | None) -> None:
        self._run_url, self._label, self._attempt, self._job, self._folder, self._heard = run_url, label, attempt, job, folder, heard
        self._every_s = environment.seconds("LAUNCHER_LIVE_S", EVERY_S)
        self._ended = threading.Event()
        self._sizes: dict[str, int] = {}
        self._silent = False
        self._thread = threading.Thread(target=self._listen, name="live", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write once more, if the storage answers soon."""
        self._ended.set()
        self._thread.join(_JOIN_S)

    def _listen(self) -> None:
        soon_s = min(_SOON_S, self._every_s)
        has_ranks, due = False, 0.0  # the node's first sign comes soon, and that of its ranks as soon as there is one
        while True:
            ended = self._ended.wait(self._every_s if has_ranks else soon_s)
            begun = has_ranks or any(self._folder.glob("rank-*"))
            if not (ended or begun or time.monotonic() >= due):
                continue
            has_ranks, due = begun, time.monotonic() + self._every_s
            try:
                self._bring(ended)
            except ReportedError as error:  # an outage, a full disk: what is shown grows old, and the run goes on
                if not self._silent:
                    log.warning("%s: signs of life are not written: %s", self._label, error)
                self._silent = True
            if ended:
                return

    def _bring(self, ended: bool) -> None:
        now = time.time()
        ranks = [found for path in self._folder.glob("rank-*") if not path.suffix and (found := _read(path, now)) is not None]
        ranks.sort(key=lambda found: int(found["rank"]))
        facts = {"attempt": self._attempt, "node": self._job.node, "name": node_checks.node_name(), "written": now, "every_s": self._every_s}
        url = storage.join(place(self._run_url, self._label), f"node-{self._job.node}.json")
        storage.write_json(url, facts | {"ended": ended, "ranks": ranks})
        self._silent = False
        if self._heard is not None and ranks and ranks[0]["rank"] == 0:
            self._heard(ranks[0] | {"label": self._label, "ended": ended})
        if storage.is_remote(self._run_url) and not self._job.id:
            self._upload_logs()

    def _upload_logs(self) -> None:
        for path in self._folder.glob("rank-*.log"):
            size = path.stat().st_size
            if self._sizes.get(path.name) != size:
                storage.write_bytes(storage.join(logs(self._run_url, self._label, self._attempt), path.name), output.tail(path))
                self._sizes[path.name] = size


def _read(path: Path, now: float) -> Facts | None:
    """What a rank said last, with how long ago that was, and when it last showed that it runs; None while it has not begun."""
    for _ in range(_TRIES):  # a look may fall into a write
        try:
            found = json.loads(path.read_bytes()[:_LARGEST])
            heard_s = max(0.0, now - path.stat().st_mtime)
            break
        except (OSError, ValueError):
            continue
    else:
        return None
    said = found.pop("time", now)
    plain = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in found.items()}
    return {**plain, "said_s": max(0.0, now - said), "heard_s": heard_s, "state": process_state(int(found["pid"]))}


def process_state(pid: int) -> str:
    """The kernel's letter for a process of this machine: R, S, T (stopped), D ...; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def signs(run_url: str, label: str, attempt: int) -> list[tuple[str, dict[str, Any]]]:
    """What the nodes of an attempt said last, node 0 first, each with the URL of its file. Files that are gone meanwhile, or are nobody's of ours, are left out."""
    folder, found = place(run_url, label), []
    for name in storage.list_level(folder):
        if name.startswith("node-") and name.endswith(".json"):
            url = storage.join(folder, name)
            with contextlib.suppress(DataError):
                node = stored.read(url, run_records.Live)
                if node["attempt"] == attempt:
                    found.append((url, node))
    return sorted(found, key=lambda sign: int(sign[1]["node"]))
