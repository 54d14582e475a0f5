"""Saves checkpoints in the background (docs/contracts.md, section 6): tensors are copied to CPU memory during the next forward and backward passes, which do
not change them, and are then written while training continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infra.world import World
from train.ranks import watchdog
from train.ranks.watchdog import SAVER_THREAD
from train.weights import checkpoint
from train.weights.fragments import Fragment

watchdog.waits_for_saver(__file__)


class Checkpointer:
    """Writes the checkpoints of one stage in a thread, one at a time. Every method is collective."""

    def __init__(self, stage_url: str, world: World, keep: int, keep_every: int = 0) -> None:
        """
        Args:
            stage_url: the stage's folder.
            keep: number of newest checkpoints that are kept.
            keep_every: the first checkpoint at or after each multiple of this many updates is never deleted; 0: no such checkpoints.
        """
        self.stage_url, self.world, self.keep, self.keep_every = stage_url, world, keep, keep_every
        # The thread's collectives have their own process group, so that they cannot be mixed up with those of the training step.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, SAVER_THREAD)
        self._staging: Future[None] | None = None
        self._job: Future[None] | None = None
        self._staged: dict[str, Fragment] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self.saved = 0
        """The update of the last checkpoint that is complete; 0: none of this process."""
        self.seconds = 0.0
        """How long the last save took in the thread, from the copies to meta.json."""

    def save(self, step: int, fragments: dict[str, Fragment], meta: dict[str, Any], *, ready: Callable[[], None] | None = None) -> float:
        """Start to copy and write a checkpoint. Waits only for the previous write, if it is still running; returns the seconds waited.

        The tensors must not change until ``settle`` has been called. GPU tensors are copied on a side stream into pinned memory, which is reused; CPU tensors are
        copied in the thread.

        Args:
            ready: called in the thread before it reads CPU tensors; returns when they are up to date.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        began = time.perf_counter()
        self.wait()
        copies = {name: self._copy_of(name, fragment) for name, fragment in fragments.items()}
        pairs = [(copies[name].tensor, fragment.tensor) for name, fragment in fragments.items()]
        self._enqueue([pair for pair in pairs if pair[1].is_cuda])
        self._staging = self._thread.submit(_stage, [pair for pair in pairs if not pair[1].is_cuda], ready)
        self._job = self._thread.submit(self._write, self._staging, step, copies, deepcopy(meta))  # lists in it may grow while it waits
        return time.perf_counter() - began

    def settle(self) -> float:
        """Must be called before the tensors of the last ``save`` change. Waits for the copies of CPU tensors and returns the seconds waited. For the copies of
        GPU tensors the current stream is made to wait, not this process.

        Raises:
            Exception: whatever ``ready`` raised.
        """
        if self._staging is None:
            return 0.0
        began = time.perf_counter()
        staging, self._staging = self._staging, None
        staging.result()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
        return time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the write that is running, if one is.

        Raises:
            CheckpointError: it failed.
        """
        if self._job is not None:
            job, self._job = self._job, None
            job.result()

    def _copy_of(self, name: str, source: Fragment) -> Fragment:
        copy, tensor = self._staged.get(name), source.tensor
        if (
            copy is None
            or copy.tensor.shape != tensor.shape
            or copy.tensor.dtype != tensor.dtype
            or (copy.offset, copy.total) != (source.offset, source.total)
        ):
            target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copy = self._staged[name] = Fragment(target, source.offset, source.total)
        return copy

    def _enqueue(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy GPU tensors on the side stream, after all work that is already queued on the current stream."""
        if not pairs:
            return
        if self._stream is None or self._copied is None:
            self._stream, self._copied = torch.cuda.Stream(), torch.cuda.Event()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source.detach(), non_blocking=True)
            self._copied.record(self._stream)

    def _write(self, staging: Future[None], step: int, fragments: dict[str, Fragment], meta: dict[str, Any]) -> None:
        began = time.perf_counter()
        staging.result()
        if self._copied is not None:
            self._copied.synchronize()
        checkpoint.save(self.stage_url, step, fragments, meta, self.world, self.keep, self.keep_every, group=self._group)
        self.saved, self.seconds = step, time.perf_counter() - began


def _stage(pairs: list[tuple[Tensor, Tensor]], ready: Callable[[], None] | None) -> None:
    if ready is not None:
        ready()
    with torch.no_grad():
        for target, source in pairs:
            target.copy_(source)
