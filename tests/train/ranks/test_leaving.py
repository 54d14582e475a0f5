"""An evaluation that all ranks leave together once one of them is asked to stop. A few seconds."""

from __future__ import annotations

import signal
from functools import partial

import pytest
import torch
import torch.distributed as dist

from infra.signals import StopFlag
from infra.world import World
from tests.support.ranks import run_in_ranks
from train.ranks.leaving import Left, equally_often, leave_if_stopped, nothing


def looked_at(world: World, askers: list[int]) -> list[tuple[list[int], str]]:
    """For each of ``askers``: batches that a rank got, the first one two and the second three, where that rank is asked to stop during its second; and
    how it ended."""
    return [_looked_at(world, asked) for asked in askers]


def _looked_at(world: World, asked: int) -> tuple[list[int], str]:
    stop, seen = StopFlag(), list[int]()
    try:
        for batch in equally_often(list(range(2 + world.rank)), partial(leave_if_stopped, stop)):
            seen.append(batch)
            if world.rank == asked and batch == 1:
                stop.handle(signal.SIGTERM, None)
    except Left:
        return seen, "left"
    sums = torch.tensor([len(seen)])
    dist.all_reduce(sums)  # what an evaluation ends with: they are all here
    return seen, f"summed {int(sums)}"


def test_ranks_with_unequal_numbers_of_batches_leave_together_or_not_at_all() -> None:
    nobody, the_first, the_second = zip(*run_in_ranks(looked_at, 2, [-1, 0, 1]), strict=True)
    assert nobody == (([0, 1], "summed 5"), ([0, 1, 2], "summed 5"))
    assert the_first == the_second == (([0, 1], "left"), ([0, 1], "left"))


def test_a_process_of_its_own_leaves_where_it_is_asked_and_what_is_not_to_be_left_goes_on() -> None:
    stop = StopFlag()
    assert list(equally_often([1, 2], partial(leave_if_stopped, stop))) == [1, 2]
    stop.handle(signal.SIGTERM, None)
    with pytest.raises(Left):
        list(equally_often([1, 2], partial(leave_if_stopped, stop)))
    assert list(equally_often([1, 2], nothing)) == [1, 2]
