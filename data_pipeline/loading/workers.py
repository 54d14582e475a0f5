"""Batches made by worker processes: torch's DataLoader over forked processes, with errors that stay what they are and ends that are noticed.

Worker w of W makes batches w, w + W, ...; DataLoader hands them out in that order. A worker's own error is raised here as it was; a worker that was
killed is an error that names it; workers die with their parent, and leave stop signals to it.
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
    """An error on its way from a worker. Raised there, it would come as text with a traceback in it, and of another class."""

    def __init__(self, error: ReportedError) -> None:
        self.error = error


class _Flag:
    """An event without a lock. A worker that is killed while it asks multiprocessing's Event keeps its lock, and the parent would wait for that forever."""

    def __init__(self) -> None:
        self._byte = mmap.mmap(-1, 1)  # anonymous and shared: forked processes see the same byte

    def is_set(self) -> bool:
        return self._byte[0] != 0

    def set(self) -> None:
        self._byte[0] = 1


class _Context(ForkContext):
    """Forked processes: shard caches and transforms are shared, not pickled."""

    def Event(self) -> _Flag:  # type: ignore[override]  # DataLoader makes one, which tells workers to end
        return _Flag()


class _Share(IterableDataset):  # type: ignore[type-arg]
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
    """Worker processes, forked from this one, that make batches ahead."""

    def __init__(self, make: Callable[[int, int], Iterator[B]], workers: int, prefetch: int) -> None:
        """
        Args:
            make: (worker, number of workers) -> that worker's batches, without end.
            workers: processes, at least 1.
            prefetch: batches that each prepares ahead.
        """
        parent = os.getpid()
        loader = DataLoader(
            _Share(make, prefetch),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_Context(),
            worker_init_fn=lambda worker: _settle(parent),
            generator=torch.Generator(),  # DataLoader draws a seed, and must not draw it from the generator of the weights
        )
        self._iterator = iter(loader)
        self._processes = list(self._iterator._workers)
        self._asked = False
        # A forgotten one goes before its DataLoader, which would ask the workers to end through a queue that may be gone already, then by SIGTERM.
        self._finalizer = weakref.finalize(self, _kill, self._processes, parent)
        _running.add(self)
        _hold_back_torchs_handler()

    @property
    def pids(self) -> list[int]:
        """Process numbers of the workers."""
        return [process.pid for process in self._processes]

    def next(self) -> B:
        """The next batch.

        Raises:
            ReportedError: a worker's own (DataError, ...), or one that says which worker was killed.
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
        """End the workers; again is fine."""
        if self._processes and self._processes[0]._parent_pid == os.getpid():
            self._iterator._shutdown_workers()
            self._finalizer()  # for those in a long download
        self._processes = []
        _running.discard(self)


def _kill(processes: list[Any], parent: int) -> None:
    """End what is left of the workers: they do not hear SIGTERM."""
    if os.getpid() == parent:  # not in another worker, which has a copy of this
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _hold_back_torchs_handler() -> None:
    """A worker's end is found by ``next``: torch's handler of SIGCHLD would raise wherever the process is then, within an update or a save."""
    found = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and callable(found) and getattr(found, "func", None) is not _if_asked:
        signal.signal(signal.SIGCHLD, partial(_if_asked, found))


def _if_asked(handler: Callable[[int, FrameType | None], Any], number: int, frame: FrameType | None) -> None:
    """Handle a signal as ``handler`` does while a batch is waited for, and not at all at other times."""
    if any(workers._asked for workers in _running):
        handler(number, frame)


def _settle(parent: int) -> None:
    """In a new worker: stop signals are the parent's business (it wants batches until it has saved), and its end is the worker's."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(parent)


def _end(code: int | None) -> str:
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


@atexit.register
def _close_all() -> None:
    """Before multiprocessing would wait for workers that do not hear SIGTERM."""
    for workers in list(_running):
        workers.close()
