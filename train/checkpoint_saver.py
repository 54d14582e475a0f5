"""Saving checkpoints beside training: the loop stops only while its tensors are copied to CPU memory (docs/contracts.md, section 6)."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infra.world import World
from train import checkpoint
from train.fragments import Fragment


class Saver:
    """Writes checkpoints of one stage in a thread, one at a time. Every method is collective."""

    def __init__(self, stage_url: str, world: World, keep: int, keep_every: int = 0) -> None:
        """
        Args:
            stage_url: the stage's folder.
            keep: newest checkpoints kept.
            keep_every: those after a multiple of this many updates are kept for good; 0: none.
        """
        self.stage_url, self.world, self.keep, self.keep_every = stage_url, world, keep, keep_every
        # The thread's collectives have a group of their own: they must not mix with the training step's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._job: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}

    def save(self, step: int, fragments: dict[str, Fragment], meta: dict[str, Any]) -> float:
        """Start to write a checkpoint, and return the seconds for which the caller had to wait.

        That is: the rest of the previous write, if it is not done, and the copy to CPU memory (pinned on a GPU, and reused).

        Raises:
            CheckpointError: the previous one could not be written.
        """
        began = time.perf_counter()
        self.wait()
        copies = {name: Fragment(self._copy(name, fragment.tensor), fragment.offset, fragment.total) for name, fragment in fragments.items()}
        if any(fragment.tensor.is_cuda for fragment in fragments.values()):
            torch.cuda.synchronize()
        self._job = self._thread.submit(self._write, step, copies, meta)
        return time.perf_counter() - began

    def wait(self) -> None:
        """Finish the write under way.

        Raises:
            CheckpointError: it failed.
        """
        if self._job is not None:
            job, self._job = self._job, None
            job.result()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        target = self._staged.get(name)
        if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
            target = self._staged[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return target.copy_(tensor.detach(), non_blocking=True)

    def _write(self, step: int, fragments: dict[str, Fragment], meta: dict[str, Any]) -> None:
        checkpoint.save(self.stage_url, step, fragments, meta, self.world, self.keep, self.keep_every, group=self._group)
