"""What ranks learn of each other's gradients: counts of planted values, norms and flags, by resblock."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from train.engines.zero import exponents, measures
from train.engines.zero.compression.update import Watched
from train.engines.zero.exponents import Exponents
from train.engines.zero.shards import Gradients, GradientSlots, Piece, pieces


def test_planted_values_are_counted_where_they_are() -> None:
    small, least = 2.0**-15, 2.0**-14  # below, and at, the smallest normal number of fp16
    tensors = [
        torch.tensor([0.0, small, least, 3.0]),
        torch.tensor([0.0, 0.0, -small, -4.0]),
        torch.tensor([0.0, 2.0]),
        torch.tensor([0.0, math.inf]),
        torch.tensor([6e4]),  # finite, beside the infinite one
    ]
    # The third is a bias, the last two lie outside of the resblocks.
    layout = GradientSlots([0, 1, 1, 2, 2], 3, [t.numel() for t in tensors], [True, True, False, False, False], torch.device("cpu"))
    found = Gradients(tensors, layout)
    once = measures.local(found, 3, count=True, device=torch.device("cpu"))
    both = measures.agreed((2 * once).tolist(), 3, replicas=1)  # two ranks that hold as much
    assert both.bad == [False, False, True]
    assert both.squares == pytest.approx([2 * (9 + small**2 + least**2), 2 * (16 + small**2 + 4), 0.0])
    assert both.zeros[:2] == [0.25, 0.5] and both.subnormals[:2] == [0.25, 0.25]
    assert math.isnan(both.zeros[2]) and math.isnan(both.subnormals[2])
    assert measures.agreed((2 * once).tolist(), 3, replicas=2).squares == pytest.approx([value / 2 for value in both.squares])
    uncounted = measures.agreed(measures.local(found, 3, count=False, device=torch.device("cpu")).tolist(), 3, replicas=1)
    assert all(math.isnan(share) for share in uncounted.zeros) and uncounted.bad == both.bad


def test_what_compression_owes_is_said_by_resblock_and_in_all() -> None:
    tensors = [torch.ones(4), torch.ones(4), torch.ones(2)]
    layout = GradientSlots([0, 1, 2], 3, [4, 4, 2], [True, True, False], torch.device("cpu"))
    watched = Watched(torch.tensor([9.0, 1.0, 0.0]).double(), torch.tensor([1.0, 4.0, 0.0]).double())
    vector = measures.local(Gradients(tensors, layout), 3, count=True, device=torch.device("cpu"), watched=watched)
    found = measures.agreed((2 * vector).tolist(), 3, replicas=2)
    assert found.owed[:2] == [3.0, 0.5] and found.owed_in_all == pytest.approx(2**0.5) and math.isnan(found.owed[2])
    unknown = measures.agreed(measures.local(Gradients(tensors, layout), 3, count=True, device=torch.device("cpu")).tolist(), 3, replicas=1)
    assert math.isnan(unknown.owed_in_all) and all(math.isnan(value) for value in unknown.owed)


def test_a_parameter_of_fewer_elements_than_ranks_lies_on_the_first_of_them_alone() -> None:
    module = nn.Module()
    for name, elements, width in (("wide", 7, 2), ("small", 2, 1)):
        parameter: Any = nn.Parameter(torch.zeros(elements))
        parameter.ds_numel, parameter.partition_numel = elements, lambda width=width: width
        module.register_parameter(name, parameter)
    optimizer = SimpleNamespace(fp16_groups=[list(module.parameters())])
    found = [pieces(optimizer, 3, module, rank) for rank in range(4)]
    assert found[0] == [Piece("wide", 0, 0, 0, 2, 7), Piece("small", 0, 2, 0, 1, 2)]
    assert found[1] == [Piece("wide", 0, 0, 2, 2, 7), Piece("small", 0, 2, 1, 1, 2)]
    assert found[2:] == [[Piece("wide", 0, 0, 4, 2, 7)], [Piece("wide", 0, 0, 6, 1, 7)]]


def test_exponents_are_counted_where_they_are_without_zeros_and_what_is_not_finite() -> None:
    tensors = [
        torch.tensor([0.0, 1.0, 1.999, 2.0, -0.5]),
        torch.tensor([2.0**-60, 2.0**20, math.inf, math.nan], dtype=torch.float32),
        torch.tensor([2.0**-24, 65504.0], dtype=torch.float16),
    ]
    layout = GradientSlots([0, 1, 1], 2, [t.numel() for t in tensors], [True, False, False], torch.device("cpu"))
    counter = Exponents(2, torch.device("cpu"))
    assert counter.read(1) == [], "not asked for"
    counter.ask(Gradients(tensors, layout))
    first, second = counter.read(1)
    assert {exponents.LOWEST + place: count for place, count in enumerate(first) if count} == {-1: 1, 0: 2, 1: 1}
    assert {exponents.LOWEST + place: count for place, count in enumerate(second) if count} == {-48: 1, -24: 1, 15: 1, 16: 1}
    assert counter.read(1) == [] and len(first) == exponents.BINS
    counter.ask(Gradients(tensors, layout))
    assert sum(counter.read(2)[0]) == 2, "a shard that two nodes hold counts once"
