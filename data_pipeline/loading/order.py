"""The global order of samples, computed lazily: in each epoch the shards are shuffled, and samples are shuffled within blocks of shards. NumPy only.

An epoch's shards are shuffled by (seed, epoch) and grouped into blocks of at least ``block`` samples; samples are shuffled within their block by (seed, epoch,
block). Finding a position takes time and memory for the shards of the epoch and the samples of one block, whatever the size of the set.

Weights: with weight w, each epoch uses all rows of a shard floor(w) times, and a fraction w - floor(w) of its rows once more. That fraction is a window of
rows that advances from epoch to epoch, so that over several epochs every row is used equally often.

Removed records keep their place in the order and are skipped. So the order of all other records does not depend on which records are removed, and a position
in the *stored* order (``EpochOrder.cursor``) keeps its meaning under any list of removed records.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from infra.seeds import generator

BLOCK = 1 << 18
"""Default number of samples that are shuffled among each other."""
_FINEST = 10_000  # weights are rounded to fractions with denominators up to this
_KEPT = 2  # epochs, and blocks of an epoch, that are kept in memory: the present and the next one

Places = NDArray[np.int32]
"""int32 [3, N]: for each sample its shard, the row in the shard, and the number of its copy (0; 1, 2, ... for repeats within an epoch)."""


class Order:
    """The order of one shard set in every epoch."""

    def __init__(
        self,
        samples: Sequence[int] | NDArray[np.int64],
        seed: int,
        weights: Sequence[float] | None = None,
        removed: NDArray[np.int64] | None = None,
        block: int = BLOCK,
        shuffle: bool = True,
    ) -> None:
        """
        Args:
            samples: number of records of each shard.
            seed: run.seed.
            weights: for each shard how often a record is used in an epoch; None: once.
            removed: sorted positions of records to skip, counted over all shards.
            block: least number of samples in a block.
            shuffle: False keeps the order of the records.

        Raises:
            ValueError: a weight is below 0, the block below 1, or a removed position outside the shards.
        """
        self.samples = np.asarray(samples, np.int64)
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.samples)])
        self.removed = np.zeros(0, np.int64) if removed is None else np.asarray(removed, np.int64)
        self.seed, self.block, self.shuffle = seed, block, shuffle
        given = [1.0] * len(self.samples) if weights is None else list(weights)
        if min(given, default=0.0) < 0 or block < 1:
            raise ValueError(f"weights {min(given, default=0.0)} and block {block}: expected weights of at least 0 and blocks of at least 1 sample")
        if len(self.removed) and not 0 <= self.removed[0] <= self.removed[-1] < self.starts[-1]:
            raise ValueError(f"removed positions run from {self.removed[0]} to {self.removed[-1]}, but there are {self.starts[-1]} records")
        parts = {weight: Fraction(weight).limit_denominator(_FINEST) for weight in set(given)}
        self._whole = np.array([int(parts[weight]) for weight in given], np.int64)
        self._numerator = np.array([(parts[weight] % 1).numerator for weight in given], np.int64)
        self._denominator = np.array([(parts[weight] % 1).denominator for weight in given], np.int64)
        self._epochs: OrderedDict[tuple[int, int], EpochOrder] = OrderedDict()

    @property
    def empty(self) -> bool:
        """Whether all epochs are without samples."""
        used = self.samples * (self._whole + self._numerator) > 0
        return not int((self.samples - np.diff(np.searchsorted(self.removed, self.starts)))[used].sum())

    def epoch(self, epoch: int, visit: int | None = None) -> EpochOrder:
        """The order of an epoch, which is the ``visit``-th epoch that reads this set (None: all epochs read it)."""
        key = (epoch, epoch if visit is None else visit)
        if key not in self._epochs:
            self._epochs[key] = EpochOrder(self, epoch, *self._instances(key[1]))
            if len(self._epochs) > _KEPT:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(key)
        return self._epochs[key]

    def _instances(self, visit: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The uses of shards in an epoch, as four arrays: shard, first row, number of rows, and number of the copy. A use that reaches the shard's last row
        continues at row 0."""
        # Whole uses: shard s appears floor(weight) times, as copies 0, 1, ...
        shards = np.arange(len(self.samples))
        whole = np.repeat(shards, self._whole)
        copies = np.arange(len(whole)) - np.repeat(np.cumsum(self._whole) - self._whole, self._whole)
        # The window of the fractional use: visit v takes the rows from v * fraction * samples to (v + 1) * fraction * samples, modulo the shard's size.
        # Computed in integers, so that rounding errors cannot accumulate.
        used = self._numerator * self.samples
        begin, end = visit * used // self._denominator, (visit + 1) * used // self._denominator
        partial = shards[end > begin]
        shard = np.concatenate([whole, partial])
        first = np.concatenate([np.zeros(len(whole), np.int64), (begin % np.maximum(self.samples, 1))[partial]])
        rows = np.concatenate([self.samples[whole], (end - begin)[partial]])
        copy = np.concatenate([copies, self._whole[partial]])
        # Sorted by shard, so that the order before shuffling does not depend on which uses are whole.
        keep = np.flatnonzero(rows)
        keep = keep[np.argsort(shard[keep], kind="stable")]
        return shard[keep], first[keep], rows[keep], copy[keep]


class EpochOrder:
    """One epoch of one set. Positions count visible samples; cursors count stored samples, which include those of removed records."""

    def __init__(
        self,
        order: Order,
        epoch: int,
        shard: NDArray[np.int64],
        first: NDArray[np.int64],
        rows: NDArray[np.int64],
        copy: NDArray[np.int64],
    ) -> None:
        self._order, self._epoch = order, epoch
        # Shuffle the uses of shards, group them into blocks, and sum up how many samples lie before each block: stored ones, and visible ones.
        mixed = generator(order.seed, "order", epoch).permutation(len(shard)) if order.shuffle else np.arange(len(shard))
        self._shard, self._first, self._rows, self._copy = shard[mixed], first[mixed], rows[mixed], copy[mixed]
        self._bounds = _blocks(self._rows, order.block)
        self._stored = _sums(self._rows, self._bounds)
        self._visible = _sums(self._rows - self._gone(), self._bounds)
        self._blocks: OrderedDict[int, tuple[Places, NDArray[np.bool_] | None]] = OrderedDict()

    @property
    def count(self) -> int:
        """Visible samples of the epoch."""
        return int(self._visible[-1])

    @property
    def stored(self) -> int:
        """Stored samples of the epoch, including those of removed records."""
        return int(self._stored[-1])

    @property
    def num_blocks(self) -> int:
        return len(self._bounds) - 1

    def block_of(self, position: int) -> int:
        """The block that holds the visible sample at a position."""
        return int(np.searchsorted(self._visible, position, side="right")) - 1

    def shards_of(self, block: int) -> NDArray[np.int64]:
        """The shards that a block reads, each once."""
        return np.unique(self._shard[self._bounds[block] : self._bounds[block + 1]])

    def at(self, positions: NDArray[np.int64]) -> Places:
        """Places of the visible samples at some ascending positions."""
        if not len(positions):
            return np.zeros((3, 0), np.int32)
        blocks = np.searchsorted(self._visible, positions, side="right") - 1
        cuts = np.flatnonzero(np.diff(blocks)) + 1
        parts = [
            self._places(int(blocks[part[0]]))[0][:, positions[part] - self._visible[blocks[part[0]]]]
            for part in np.split(np.arange(len(positions)), cuts)
        ]
        return np.concatenate(parts, axis=1)

    def cursor(self, drawn: int) -> int:
        """How many stored samples have been passed once ``drawn`` visible ones are drawn."""
        if drawn == 0:
            return 0
        block = self.block_of(drawn - 1)
        shown = self._places(block)[1]
        last = drawn - 1 - int(self._visible[block])
        return int(self._stored[block]) + 1 + (last if shown is None else int(np.flatnonzero(shown)[last]))

    def drawn(self, cursor: int) -> int:
        """How many visible samples are among the first ``cursor`` stored ones: the position at which to continue, perhaps with other removed records.

        Raises:
            ValueError: the epoch has fewer samples.
        """
        if not 0 <= cursor <= self.stored:
            raise ValueError(f"position {cursor} of an epoch of {self.stored} samples")
        if cursor == self.stored:
            return self.count
        block = int(np.searchsorted(self._stored, cursor, side="right")) - 1
        shown = self._places(block)[1]
        inside = cursor - int(self._stored[block])
        return int(self._visible[block]) + (inside if shown is None else int(shown[:inside].sum()))

    def _gone(self) -> NDArray[np.int64]:
        """Number of removed records in each use of a shard: in its rows up to the end of the shard, and in its rows that continue at row 0."""
        start, size = self._order.starts[self._shard], self._order.samples[self._shard]
        end = self._first + self._rows
        ends = [start + self._first, start + np.minimum(end, size), start, start + np.maximum(end - size, 0)]
        a, b, c, d = (np.searchsorted(self._order.removed, each) for each in ends)
        gone: NDArray[np.int64] = b - a + d - c
        return gone

    def _places(self, block: int) -> tuple[Places, NDArray[np.bool_] | None]:
        """The places of a block's visible samples in order, and a mask of the visible ones among its stored samples (None: all are visible)."""
        if block not in self._blocks:
            self._blocks[block] = self._make(block)
            if len(self._blocks) > _KEPT:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _make(self, block: int) -> tuple[Places, NDArray[np.bool_] | None]:
        order, part = self._order, slice(self._bounds[block], self._bounds[block + 1])
        shard, rows = self._shard[part], self._rows[part]
        total = int(rows.sum())
        # The row of each sample of the block: 0, 1, 2, ... within each use, shifted to its first row, and wrapped at the end of the shard.
        before = np.cumsum(rows) - rows
        row = np.arange(total) + np.repeat(self._first[part] - before, rows)
        size = np.repeat(order.samples[shard], rows)
        row -= np.where(row >= size, size, 0)
        places = np.stack([np.repeat(shard, rows), row, np.repeat(self._copy[part], rows)]).astype(np.int32)
        # A sample is visible if its position in the whole set is not in the sorted list of removed positions.
        shown = None
        if self._visible[block + 1] - self._visible[block] != total:
            at = np.repeat(order.starts[shard], rows) + row
            found = np.searchsorted(order.removed, at)
            shown = order.removed[np.minimum(found, len(order.removed) - 1)] != at
        # Removed samples are shuffled along with the others and left out afterwards, so that removing one does not move the others.
        if order.shuffle:
            mixed = generator(order.seed, "order", self._epoch, block).permutation(total)
            places = places[:, mixed]
            shown = None if shown is None else shown[mixed]
        return (places if shown is None else places[:, shown]), shown


class Endless:
    """An endless order over n sets that take turns: epoch e reads set e mod n. A position is (epoch, number of visible samples drawn in it)."""

    def __init__(self, orders: Sequence[Order]) -> None:
        """
        Raises:
            ValueError: there is no order, or one has no samples.
        """
        if not orders or any(order.empty for order in orders):
            raise ValueError("an order without samples never ends")
        self._orders = list(orders)

    def epoch(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        return self._orders[epoch % len(self._orders)].epoch(epoch, epoch // len(self._orders))

    def advance(self, epoch: int, drawn: int, samples: int = 0) -> tuple[int, int]:
        """The position ``samples`` further on. At the end of an epoch it is the beginning of the next one."""
        drawn += samples
        while drawn >= (count := self.epoch(epoch).count):
            epoch, drawn = epoch + 1, drawn - count
        return epoch, drawn

    def every(self, epoch: int, drawn: int, samples: int, first: int, stride: int) -> list[tuple[int, Places]]:
        """One rank's part of the next ``samples`` samples: number ``first`` and every ``stride``-th after it, as (epoch, places) in order."""
        found = []
        while samples:
            epoch, drawn = self.advance(epoch, drawn)
            order = self.epoch(epoch)
            # This epoch holds the next ``here`` samples; the rank takes first, first + stride, ... of them, and goes on counting in the next epoch.
            here = min(samples, order.count - drawn)
            if first < here:
                found.append((epoch, order.at(np.arange(drawn + first, drawn + here, stride))))
            samples, drawn, first = samples - here, drawn + here, (first - here) % stride
        return found


def _blocks(rows: NDArray[np.int64], block: int) -> NDArray[np.int64]:
    """Bounds of the blocks: each block consists of consecutive uses of shards with at least ``block`` rows; uses left over at the end join the last block."""
    ends = np.cumsum(rows)
    bounds = [0]
    while len(ends):
        reached = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        stop = int(np.searchsorted(ends, reached + block)) + 1
        if stop > len(ends):
            break
        bounds.append(stop)
    if bounds[-1] != len(ends):
        bounds[-1 if len(bounds) > 1 else len(bounds) :] = [len(ends)]
    return np.array(bounds, np.int64)


def _sums(values: NDArray[np.int64], bounds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of the values before each bound."""
    sums: NDArray[np.int64] = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])[bounds]
    return sums
