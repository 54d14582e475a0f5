"""Batches made by worker processes: torch's DataLoader with forked processes, whose errors keep their class and whose death is noticed.

Worker w of W makes batches w, w + W, ...; DataLoader returns them in order. An error in a worker is raised in this process with its class and message. If a
worker is killed, the error names it. Workers end with their parent, and ignore stop signals, which the parent handles.
"""

from __future__ import annotations

import atexit
import mmap
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.context import ForkContext
from types import FrameType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipeline.loading.shared_memory import check_room
from infra.errors import ReportedError
from infra.signals import STOP_SIGNALS, die_with_parent

B = TypeVar("B")

_running: weakref.WeakSet[Workers[Any]] = weakref.WeakSet()


class _Failure:
    """An error sent from a worker as a value. If the worker raised it, DataLoader would turn it into an error of another class, with a traceback as text."""

    def __init__(self, error: ReportedError) -> None:
        self.error = error


class _Flag:
    """An event without a lock. A worker that is killed while it reads multiprocessing's Event keeps the lock, and the parent would wait for it for ever."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)  # anonymous and shared: forked processes see the same byte

    def is_set(self) -> bool:
        return self._byte[0] != 0

    def set(self) -> None:
        self._byte[0] = 1


class _Context(ForkContext):
    """Forks worker processes, so that shard caches and transforms are shared and need not be pickled."""

    def Event(self) -> _Flag:  # type: ignore[override]  # DataLoader makes one, to tell workers to end
        return _Flag()


class _WorkerBatches(IterableDataset):  # type: ignore[type-arg]
    """The batches of one worker."""

    def __init__(self, make: Callable[[int, int], Iterator[Any]], prefetch: int) -> None:
        self._make, self._prefetch = make, prefetch

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        assert info is not None
        try:
            for number, batch in enumerate(self._make(info.id, info.num_workers)):
                if number == 0:
                    size = _bytes_of(batch)
                    check_room(
                        size * self._prefetch * info.num_workers, f"the batches that {info.num_workers} workers prepare ahead ({size} bytes each)"
                    )
                yield batch
        except ReportedError as error:
            yield _Failure(error)


def _bytes_of(batch: Any) -> int:
    values = batch.values() if isinstance(batch, dict) else [batch]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


class Workers(Generic[B]):
    """Worker processes, forked from this one, that prepare batches ahead."""

    def __init__(self, make: Callable[[int, int], Iterator[B]], workers: int, prefetch: int) -> None:
        """
        Args:
            make: (worker, number of workers) -> an endless iterator over that worker's batches.
            workers: processes, at least 1.
            prefetch: batches that each prepares ahead.
        """
        parent = os.getpid()
        loader = DataLoader(
            _WorkerBatches(make, prefetch),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_Context(),
            worker_init_fn=lambda worker: _settle(parent),
            generator=torch.Generator(),  # DataLoader draws a seed, which must not advance torch's global generator
        )
        self._iterator = iter(loader)
        self._processes = list(self._iterator._workers)
        self._asked = False
        # If this object is never closed, its workers must end before its DataLoader is collected: that would tell them through a queue which may be gone already,
        # and then send SIGTERM, which they ignore.
        self._finalizer = weakref.finalize(self, _kill, self._processes, parent)
        _running.add(self)
        _hold_back_torchs_handler()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [process.pid for process in self._processes]

    def next(self) -> B:
        """The next batch.

        Raises:
            ReportedError: the worker's error (DataError, ...), or one that says which worker was killed.
        """
        try:
            self._asked = True
            found = next(self._iterator)
        except RuntimeError as error:
            ended = [
                f"worker {number} of {len(self._processes)} (pid {process.pid}, {_end(process.exitcode)})"
                for number, process in enumerate(self._processes)
                if not process.is_alive()
            ]
            if not ended:
                raise
            raise ReportedError(
                f"{', '.join(ended)} of the loader ended; if it was killed for memory, lower data.workers or the batch, or give the job more memory."
            ) from error
        finally:
            self._asked = False
        if isinstance(found, _Failure):
            raise found.error
        batch: B = found
        return batch

    def close(self) -> None:
        """End the workers. May be called again."""
        if self._processes and self._processes[0]._parent_pid == os.getpid():
            self._iterator._shutdown_workers()
            self._finalizer()  # kills those that are still busy, for example with a long download
        self._processes = []
        _running.discard(self)


def _kill(processes: list[Any], parent: int) -> None:
    """Kill the workers that still run; they ignore SIGTERM."""
    if os.getpid() == parent:  # not in another worker, which has a copy of this finalizer
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _hold_back_torchs_handler() -> None:
    """Limit torch's handler of SIGCHLD to the time in which a batch is awaited: it raises wherever the process happens to be, perhaps in an update or a save."""
    found = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and callable(found) and getattr(found, "func", None) is not _if_asked:
        signal.signal(signal.SIGCHLD, partial(_if_asked, found))


def _if_asked(handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
    """Pass a signal to ``handler`` while a batch is awaited; ignore it at other times."""
    if any(workers._asked for workers in _running):
        handler(number, frame)


def _settle(parent: int) -> None:
    """Set up a new worker: it ignores stop signals, because the parent needs batches until it has saved, and it ends when the parent ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)


def _end(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


@atexit.register
def _close_all() -> None:
    """Close all workers at exit, before multiprocessing sends them SIGTERM, which they ignore, and waits."""
    for workers in list(_running):
        workers.close()
