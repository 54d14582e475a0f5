"""Work of all ranks together that can be left between two of its pieces, once any of them is asked to stop: an evaluation, which a next start makes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from infra.signals import StopFlag
from train.ranks import watchdog
from train.ranks.device import patient_group

watchdog.waits_for_ranks(__file__)
T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
Between = Callable[[], None]
"""Called between two pieces of work, equally often on every rank; raises ``Left`` on all of them or on none."""


class Left(Exception):
    """All ranks have left the work: one of them was asked to stop."""


class Batches(Sized, Protocol[T_co]):
    """What can be gone through again and again, and says how many there are."""

    def __iter__(self) -> Iterator[T_co]: ...


def nothing() -> None:
    """Where work is not to be left."""


def leave_if_stopped(stop: StopFlag) -> None:
    """Collective, over gloo: a GPU is not waited for.

    Raises:
        Left: a rank was asked to stop.
    """
    asked = bool(stop)
    if dist.is_initialized() and dist.get_world_size() > 1:
        asked = _largest(int(asked)) > 0
    if asked:
        raise Left


def equally_often(batches: Batches[T], between: Between) -> Iterator[T]:
    """A rank's batches, with ``between`` before each of them, and as often on a rank that has fewer. Collective."""
    rounds, made = len(batches), 0
    if between is not nothing and dist.is_initialized() and dist.get_world_size() > 1:
        rounds = _largest(rounds)
    for batch in batches:
        between()
        made += 1
        yield batch
    for _ in range(made, rounds):
        between()


def _largest(number: int) -> int:
    agreed = torch.tensor(number)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=patient_group())
    return int(agreed)
