"""The global order: every sample as often as its weight says, found without walking, and untouched by what is removed."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.loading.order import Endless, EpochOrder, Order

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(any)


def walk(epoch: EpochOrder) -> list[tuple[int, int, int]]:
    """All places of an epoch, in order."""
    return [tuple(place) for place in epoch.at(np.arange(epoch.count)).T.tolist()]


def positions(order: Order, epoch: int = 0) -> list[int]:
    return [int(order.starts[shard]) + row for shard, row, _ in walk(order.epoch(epoch))]


@given(SHARDS, st.integers(1, 40), st.integers(0, 5), st.booleans())
def test_at_weight_one_every_record_comes_once_an_epoch(samples: list[int], block: int, epoch: int, shuffle: bool) -> None:
    found = positions(Order(samples, 3, block=block, shuffle=shuffle), epoch)
    assert sorted(found) == list(range(sum(samples)))
    assert shuffle or found == sorted(found)


@given(SHARDS, st.integers(1, 40), st.data())
def test_removed_records_are_passed_over_and_the_others_keep_their_order(samples: list[int], block: int, data: Any) -> None:
    removed = np.array(sorted(data.draw(st.sets(st.integers(0, sum(samples) - 1)))), np.int64)
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.25, 2.0]), min_size=len(samples), max_size=len(samples)))
    every, fewer = (Order(samples, 3, weights, gone, block) for gone in (None, removed))
    for epoch in range(3):
        a, b = walk(every.epoch(epoch)), walk(fewer.epoch(epoch))
        gone = set(removed.tolist())
        assert b == [place for place in a if int(every.starts[place[0]]) + place[1] not in gone]
        assert fewer.epoch(epoch).count == len(b) and fewer.epoch(epoch).stored == len(a)


@given(SHARDS, st.integers(1, 40), st.data())
def test_a_position_is_kept_exactly_under_another_list_of_removed_records(samples: list[int], block: int, data: Any) -> None:
    lists = [np.array(sorted(data.draw(st.sets(st.integers(0, sum(samples) - 1)))), np.int64) for _ in range(2)]
    before, after = (Order(samples, 3, [1.5] * len(samples), gone, block).epoch(2) for gone in lists)
    drawn = data.draw(st.integers(0, before.count))
    now = after.drawn(before.cursor(drawn))
    done, rest = walk(before)[:drawn], walk(after)[now:]
    assert not set(done) & set(rest), "nothing twice"
    assert set(walk(after)) - set(rest) - set(done) <= set(walk(after)) - set(walk(before)), "nothing lost but what had been removed until now"
    assert before.drawn(before.cursor(drawn)) == drawn


def test_weights_above_one_bring_copies_and_below_one_take_turns() -> None:
    order = Order([10, 4, 7], 0, [2.0, 0.5, 1.3], block=8)
    uses: Counter[tuple[int, int]] = Counter()
    for epoch in range(10):
        here = Counter(shard for shard, _, _ in walk(order.epoch(epoch)))
        assert here[0] == 20 and here[1] == 2 and here[2] in (9, 10)
        assert len(set(walk(order.epoch(epoch)))) == sum(here.values()), "copies are told apart"
        uses.update((shard, row) for shard, row, _ in walk(order.epoch(epoch)))
    assert [sorted({uses[shard, row] for row in range(rows)}) for shard, rows in enumerate((10, 4, 7))] == [[20], [5], [13]]
    assert not walk(Order([5, 5], 0, [0.0, 0.0]).epoch(0))


def test_the_turns_of_a_set_go_by_its_own_visits() -> None:
    order = Order([6], 0, [0.5])
    assert set(positions_of(order.epoch(0, 0))) == {0, 1, 2} == set(positions_of(order.epoch(1, 0)))
    assert set(positions_of(order.epoch(2, 1))) == {3, 4, 5}
    both = Endless([Order([6], 0, [0.5]), Order([6], 1, [0.5])])
    assert [set(positions_of(both.epoch(epoch))) for epoch in range(4)] == [{0, 1, 2}, {0, 1, 2}, {3, 4, 5}, {3, 4, 5}]


def positions_of(epoch: EpochOrder) -> list[int]:
    return [row for _, row, _ in walk(epoch)]


def test_epochs_and_seeds_differ_and_repeat() -> None:
    orders = [positions(Order([50, 50], seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[1] == positions(Order([50, 50], 0), 1)


def test_samples_stay_in_their_block_and_blocks_mix_several_shards() -> None:
    epoch = Order([10] * 100, 0, block=95).epoch(0)
    assert epoch.num_blocks == 10
    shards = [[shard for shard, _, _ in walk(epoch)[start : start + 100]] for start in range(0, 1000, 100)]
    assert all(len(set(block)) == 10 for block in shards) and not set(shards[0]) & set(shards[1])
    assert [set(epoch.shards_of(block).tolist()) for block in range(10)] == [set(block) for block in shards]
    assert shards[0] != sorted(shards[0])
    assert [epoch.block_of(position) for position in (0, 99, 100, 999)] == [0, 0, 1, 9]
    assert Order([10] * 19, 0, block=95).epoch(0).num_blocks == 1, "a rest too small for a block joins the last one"


@given(st.lists(SHARDS, min_size=1, max_size=3), st.integers(1, 30), st.integers(1, 4), st.integers(0, 60))
def test_ranks_share_any_stretch_of_the_endless_order(sets: list[list[int]], batch: int, ranks: int, start: int) -> None:
    endless = Endless([Order(samples, seed, block=9) for seed, samples in enumerate(sets)])
    position = endless.advance(0, 0, start)
    whole = [(epoch, *place) for epoch, places in endless.every(*position, batch, 0, 1) for place in places.T.tolist()]
    assert len(whole) == batch
    for rank in range(ranks):
        part = [(epoch, *place) for epoch, places in endless.every(*position, batch, rank, ranks) for place in places.T.tolist()]
        assert part == whole[rank::ranks]
        assert all(places.shape[1] for _, places in endless.every(*position, batch, rank, ranks)), "no epoch without a sample"
    counted = [(epoch, *place) for epoch in range(position[0] + 40) for place in walk(endless.epoch(epoch))][: start + batch]
    assert len(counted) < start + batch or counted[start:] == whole


def test_a_place_among_250_million_is_found_in_the_time_of_one_block() -> None:
    samples = np.full(25_000, 10_000)
    removed = np.arange(0, 250_000_000, 1_000)
    tracemalloc.start()
    began = time.process_time()
    order = Order(samples, 7, removed=removed)
    epoch = order.epoch(3)
    place = epoch.at(np.array([epoch.count - 5]))
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch.count == 249_750_000 and place.shape == (3, 1)
    assert seconds < 5 and peak < 100e6, (seconds, peak)
    assert epoch.drawn(epoch.cursor(123_456_789)) == 123_456_789


def test_what_has_no_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weights -1.0 and block 5: expected weights of at least 0 and blocks of at least 1"):
        Order([3], 0, [-1.0], block=5)
    with pytest.raises(ValueError, match=r"weights 1.0 and block 0"):
        Order([3], 0, block=0)
    with pytest.raises(ValueError, match=r"removed positions run from 1 to 3, but there are 3 records"):
        Order([3], 0, removed=np.array([1, 3]))
    with pytest.raises(ValueError, match=r"position 4 of an epoch of 3 samples"):
        Order([3], 0).epoch(0).drawn(4)
    for orders in ([], [Order([3], 0, [0.0])], [Order([0, 2], 0, removed=np.arange(2))]):
        with pytest.raises(ValueError, match="an order without samples never ends"):
            Endless(orders)


def test_copies_are_numbered_for_each_shard_and_one_record_is_an_order() -> None:
    places = Order([2, 3, 1], 0, [2.0, 1.0, 3.0]).epoch(0).at(np.arange(2 * 2 + 3 + 3)).T.tolist()
    assert sorted(places) == [
        [shard, row, copy] for shard, rows, copies in ((0, 2, 2), (1, 3, 1), (2, 1, 3)) for row in range(rows) for copy in range(copies)
    ]
    assert not Order([1], 0).empty and Order([1], 0, [0.0]).empty and Order([1], 0, removed=np.array([0])).empty
    assert not Order([1, 1], 0, [0.0, 1.0], removed=np.array([0])).empty
