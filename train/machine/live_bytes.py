"""Bytes of live tensors: counted, not sampled. Every storage is followed from its creation until it is freed, so the figures are the same in every run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return inside the block: counts the bytes that exist now, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf)
        return out

    def follow(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed, unless it is already counted."""
        if tensor.device.type == "meta":  # only describes a shape, without memory
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = self._seen[key] = storage.nbytes()
        self.now += size  # one statement without a call: threads switch at calls, and what another thread frees in between would be lost
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size = self._seen.pop(key)
        self.now -= size

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.now
