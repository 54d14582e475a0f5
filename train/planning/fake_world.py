"""One rank of a world of any size, alone in its process: collectives that send nothing and tensors without memory, under DeepSpeed's own ZeRO.

Shapes, dtypes, storages and messages are those of a real rank; values are not computed, and whoever reads one gets zero. Every tensor counts as one of the CPU,
so what a GPU's memory and the host's hold is told apart by what it is for.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from infra.world import World
from train.engines.zero import internals
from train.machine.live_bytes import LiveBytes
from train.optimizer import adamw

_aten: Any = torch.ops.aten
_c10d: Any = torch.ops.c10d
_YES_OR_NO = (_aten.equal.default, _aten.is_nonzero.default)
_TO_EACH, _SPLITS = _c10d.alltoall_base_.default, 4
"""A message of any size to each rank, and number of the argument with the elements for each."""
_SENT = {
    _c10d._allgather_base_.default: (0, 1, 2),
    _c10d.allgather_.default: (0, 1, 2),
    _c10d._reduce_scatter_base_.default: (1, 1, 2),
    _c10d.reduce_scatter_.default: (1, 1, 2),
    _TO_EACH: (1, 1, 2),
    _c10d.allreduce_.default: (0, 2, 1),
    _c10d.broadcast_.default: (0, 1, 1),
    _c10d.reduce_.default: (0, 1, 1),
    _c10d.barrier.default: (0, 0, 1),
}
"""Collective -> number of the argument with the tensors that a ring passes on, how often it does so, and number of the argument with the group."""


class Watched(LiveBytes):
    """Live bytes, and the bytes that this rank, the first, sends in collectives if each runs as a ring, and those to each rank directly."""

    def __init__(self, gpus: int) -> None:
        """
        Args:
            gpus: processes of a machine.
        """
        super().__init__()
        self.inside = self.outside = 0.0
        """To ranks of the same machine, and to others: of a ring over all ranks of several machines, a process's share of what its machine sends."""
        self._gpus = gpus

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._send(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def restart(self) -> None:
        """Forget the peak and what was sent so far."""
        super().restart()
        self.inside = self.outside = 0.0

    def _send(self, func: Any, args: Any) -> None:
        assert func in _SENT, f"{func} is not known to {__name__}"
        tensors, times, group = _SENT[func]
        ranks = dist.get_process_group_ranks(ProcessGroup.unbox(args[group]))
        if func is _TO_EACH and args[_SPLITS]:
            for rank, size in zip(ranks, args[_SPLITS], strict=True):
                near, sent = rank // self._gpus == 0, size * args[tensors].itemsize * (rank > 0)
                self.inside, self.outside = self.inside + near * sent, self.outside + (not near) * sent
            return
        sent = times * _bytes(args[tensors]) * (len(ranks) - 1) / len(ranks)
        machines = {rank // self._gpus for rank in ranks}
        if len(machines) == len(ranks) > 1:
            self.outside += sent
        else:
            self.inside += sent
            self.outside += sent / self._gpus if len(machines) > 1 else 0.0


def _bytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


class _Fake(FakeTensorMode):
    """Fake tensors whose values are zero."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else False if args[0].dtype == torch.bool else 0
        if func in _YES_OR_NO:
            return False
        return super().dispatch(func, types, args, kwargs)


@contextmanager
def fake_world(nodes: int, gpus: int) -> Iterator[tuple[World, Watched]]:
    """Inside, this process is rank 0 of ``nodes`` machines of ``gpus`` processes. The process group stays: DeepSpeed keeps groups from engine to engine, so a
    process can be in one world only."""
    world = World(0, nodes * gpus, 0, gpus)
    kept = dict(os.environ)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world.size), "LOCAL_WORLD_SIZE": str(gpus)}  # DeepSpeed reads them
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    assert (dist.get_backend(), dist.get_world_size()) == ("fake", world.size)
    watched = Watched(gpus)
    try:
        with warnings.catch_warnings(), internals.without_agreement(), adamw.with_kernel(lambda *_: None), _Fake(allow_non_fake_inputs=True), watched:
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # DeepSpeed asserts an alignment
            yield world, watched
    finally:
        os.environ.clear()
        os.environ |= kept
