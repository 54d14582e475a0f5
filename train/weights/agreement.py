"""What ranks must know of each other while a checkpoint is written or read, in few bytes: whose error comes first, and what each has to tell the main rank.

Gathering would bring every item of every rank to one of them: at 1,024 ranks some millions. Here a rank that has nothing to
tell costs eight bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def alike(group: Any = None) -> Iterator[None]:
    """A block that every rank enters and that may fail on any of them: all leave it, or all raise the error of the first rank that failed. Collective.

    Inside nothing may be collective: a rank that failed before would be missed.
    """
    error: BaseException | None = None
    try:
        yield
    except BaseException as failure:  # whatever it is, all ranks must hear of it: they would wait
        error = failure
    _raise_first(error, group)


def _raise_first(error: BaseException | None, group: Any) -> None:
    if dist.is_initialized():
        size = dist.get_world_size()
        first = torch.tensor([size if error is None else dist.get_rank()], device=_device(group))
        dist.all_reduce(first, dist.ReduceOp.MIN, group)
        failed = int(first.item())
        if failed == size:
            return
        told = [_portable(error) if failed == dist.get_rank() else None]
        dist.broadcast_object_list(told, failed, group)
        error = error if failed == dist.get_rank() else told[0]
    if error is not None:
        raise error


def gather(data: bytes, group: Any = None) -> list[bytes] | None:
    """What each rank has to tell the main rank, on the others None. Where nobody has anything, eight bytes a rank. Collective."""
    if not dist.is_initialized():
        return [data]
    device, size = _device(group), dist.get_world_size()
    longest = torch.tensor([len(data)], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group)
    room = int(longest.item())
    if not room:
        return [b""] * size if dist.get_rank() == 0 else None
    own = _bytes(len(data).to_bytes(8, "little") + data.ljust(room, b"\0"), device)
    all_ = [torch.empty_like(own) for _ in range(size)] if dist.get_rank() == 0 else None
    dist.gather(own, all_, 0, group)
    if all_ is None:
        return None
    told = (each.cpu().numpy().tobytes() for each in all_)
    return [each[8 : 8 + int.from_bytes(each[:8], "little")] for each in told]


def broadcast(data: bytes, group: Any = None) -> bytes:
    """What the main rank has to tell; what others give does not matter. Collective."""
    if not dist.is_initialized():
        return data
    device = _device(group)
    length = torch.tensor([len(data)], device=device)
    dist.broadcast(length, 0, group)
    told = _bytes(data, device) if dist.get_rank() == 0 else torch.empty(int(length.item()), dtype=torch.uint8, device=device)
    dist.broadcast(told, 0, group)
    return told.cpu().numpy().tobytes()


def _bytes(data: bytes, device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(bytearray(data), np.uint8)).to(device)


def _device(group: Any) -> torch.device:
    """Where the group's tensors lie."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")


def _portable(error: BaseException | None) -> BaseException | None:
    """The error, or where other processes could not make it again, one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
