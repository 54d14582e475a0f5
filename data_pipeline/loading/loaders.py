"""Loaders: batches from shard sets, in one global order that does not depend on the number of ranks, workers and nodes.

The order is endless: epoch 0 of set 0, epoch 1 of set 1, and so on (epoch e reads set e mod number of sets), each in the order that ``order.py`` defines.
Global batch k consists of samples [k B, (k + 1) B) of this order; rank r of R takes every R-th of them, from r on. Batches cross the ends of epochs: nothing
is dropped, padded or repeated. A position is an epoch and a place in its stored order, so that a run resumes at the exact sample on any number of ranks,
workers and nodes, even if records were taken down meanwhile.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.loading.order import BLOCK, Endless, Order
from data_pipeline.loading.shard_cache import ShardCache, check_local, check_world, fetch
from data_pipeline.loading.shared_memory import Claim, check_room
from data_pipeline.loading.transforms import Record, Sample
from data_pipeline.loading.workers import Workers
from data_pipeline.shards.index import Shard
from data_pipeline.shards.rows import ShardRows
from data_pipeline.shards.shard_set import ShardSet
from infra import storage
from infra.errors import ConfigError, DataError
from infra.seeds import generator
from infra.world import World

T = TypeVar("T")
B = TypeVar("B")
Batch = dict[str, Any]

PREFETCH = 2
"""Batches that each worker prepares ahead."""
# With a weight above 1 a record is used several times in an epoch. Transforms draw their random numbers by (epoch, id), so copy c of a record passes
# epoch + c * _COPY as its epoch: every copy gets other random numbers.
_COPY = 1 << 32
_serial = itertools.count()  # loaders are made in the same order on every rank, so a loader has the same number on all of them


def _cache_folder(place: str | Path) -> Path:
    """The parent folder of caches: ``cache`` in a local run folder, else this machine's temporary folder, because shards are always cached locally."""
    local = bool(str(place)) and not storage.is_remote(str(place))
    return storage.local_path(str(place)) / "cache" if local else Path(tempfile.gettempdir())


class ShardLoader(Generic[T, B]):
    """Endless batches from one or more shard sets, in an order that depends on the seed alone."""

    def __init__(
        self,
        sets: Sequence[ShardSet],
        cache_dir: str | Path,
        world: World,
        batch: int,
        seed: int,
        transform: Callable[[Record, int], T],
        collate: Callable[[list[T]], B],
        shuffle: bool = True,
        batch_key: str = "batch",
        workers: int = 0,
        prefetch: int = PREFETCH,
        cache_bytes: int = 0,
        block: int = BLOCK,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            sets: epoch e reads sets[e mod len(sets)].
            cache_dir: folder for cached shards of remote sets (the system's temporary folder if this is not a local path); each loader of each process group
                makes its own sub-folder. Local sets are read in place.
            world: this process; all ranks make the same loaders in the same order.
            batch: samples of one global batch.
            seed: run.seed.
            transform: (record, epoch) -> sample. Further copies of a record in one epoch are passed another number in place of the epoch.
            collate: samples of this rank -> batch.
            shuffle: False keeps the order of the records.
            batch_key: the configuration key of ``batch``, for messages.
            workers: processes of this rank that make batches; 0: ``next`` makes them itself.
            prefetch: batches that each worker prepares ahead.
            cache_bytes: limit in bytes of cached shards of remote sets on each node; 0: no limit.
            block: least number of samples that are shuffled among each other.
            weights: source -> how often each of its records is used in an epoch; 1 for sources that are not in it.

        Raises:
            ConfigError: the batch does not divide over the ranks, the environment describes other ranks, or the cache or shared memory is too small.
            DataError: there is no set, or one is empty.
        """
        if batch % world.size:
            raise ConfigError(f"{batch_key} = {batch} does not divide over {world.size} processes; use a multiple of {world.size}.")
        self._weights = {name: weight for name, weight in sorted((weights or {}).items()) if weight != 1}
        self._orders = [_order(shard_set, self._weights, seed, block, shuffle) for shard_set in sets]
        empty = [shard_set.url for shard_set, order in zip(sets, self._orders, strict=True) if order.empty]
        if not sets or empty:
            raise DataError(
                f"nothing to load: {', '.join(empty) + ' has no records' if empty else 'no shard set was given'}; run the stage that writes it again."
            )
        check_world(world)
        check_room()
        self.sets = list(sets)
        self._world, self._batch, self._seed, self._shuffle, self._block = world, batch, seed, shuffle, block
        self._transform, self._collate, self._num_workers, self._prefetch = transform, collate, workers, prefetch
        self._endless = Endless(self._orders)
        processes, folder = world.local_size * max(1, workers), _cache_folder(cache_dir)
        limits = [_limit(shard_set, order, cache_bytes, processes) for shard_set, order in zip(sets, self._orders, strict=True)]
        self._caches = [ShardCache(shard_set, folder, world, next(_serial), limit) for shard_set, limit in zip(sets, limits, strict=True)]
        self._position = (0, 0)  # epoch, samples drawn in it
        self._entered = (-1, -1)  # epoch and block that the caches are prepared for
        self._source: Workers[B] | None = None

    def next(self) -> B:
        """The next batch of this rank: ``batch / world.size`` samples.

        Raises:
            DataError: a shard is missing or damaged; the message names it, and nothing is skipped.
            ReportedError: a worker process was killed.
        """
        if self._num_workers:
            if self._source is None:
                self._source = Workers(self._batches_of, self._num_workers, self._prefetch)
            try:
                batch = self._source.next()
            except BaseException:
                self._stop_workers()
                raise
        else:
            batch = self._make(self._position)
        self._position = self._endless.advance(*self._position, self._batch)
        return batch

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [] if self._source is None else self._source.pids

    @property
    def epoch(self) -> int:
        """Epoch of the next batch's first sample."""
        return self._endless.advance(*self._position)[0]

    def state(self) -> dict[str, Any]:
        """The loader's position, as JSON-able values: the same on every rank, and valid on any number of ranks, workers and nodes.

        ``index`` counts the stored samples of the epoch that were passed, including those of removed records. So it keeps its meaning when the list of removed
        records changes.
        """
        epoch, drawn = self._position
        return {"epoch": epoch, "index": self._endless.epoch(epoch).cursor(drawn), **self._identity()}

    def _identity(self) -> dict[str, Any]:
        """Everything that the meaning of a position depends on."""
        sets = [shard_set.content_hash for shard_set in self.sets]
        return {"seed": self._seed, "shuffle": self._shuffle, "block": self._block, "weights": self._weights, "sets": sets}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            DataError: the state belongs to other shard sets, another seed or another order.
        """
        now = self._identity()
        differing = [name for name in now if state.get(name) != now[name]]
        if differing:
            parts = "; ".join(f"{name}: {state.get(name)} in the checkpoint, {now[name]} now" for name in differing)
            raise DataError(
                f"the loader's position is of another order of samples ({parts}); go back to those shard sets and that seed, or start the stage from the beginning."
            )
        try:
            epoch, index = int(state["epoch"]), int(state["index"])
            drawn = self._endless.epoch(epoch).drawn(index)
        except (ValueError, KeyError) as error:
            raise DataError(f"the loader's state is damaged ({error}); resume from an earlier checkpoint.") from error
        self._stop_workers()
        self._position = (epoch, drawn)

    def close(self) -> None:
        """End the workers, and remove cached shards and shared memory. May be called again; a loader that is never closed is closed when the process ends."""
        self._stop_workers()
        for cache in self._caches:
            cache.close()

    def _stop_workers(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = None

    def _batches_of(self, worker: int, workers: int) -> Iterator[B]:
        """The batches of this rank that a worker makes: numbers worker, worker + workers, ... from the present position on."""
        position = self._endless.advance(*self._position, worker * self._batch)
        while True:
            yield self._make(position)
            position = self._endless.advance(*position, workers * self._batch)

    def _make(self, position: tuple[int, int]) -> B:
        """This rank's part of the global batch that begins at a position."""
        self._enter(*self._endless.advance(*position))
        samples = []
        for epoch, places in self._endless.every(*position, self._batch, self._world.rank, self._world.size):
            cache = self._caches[epoch % len(self._caches)]
            for shard, row, copy in places.T.tolist():
                samples.append(self._transform(cache.rows(shard)[row], epoch + _COPY * copy))
            cache.touch()
        return self._collate(samples)

    def _enter(self, epoch: int, drawn: int) -> None:
        """When a new block begins, tell the caches which shards it reads, and which shards the next block will read."""
        order = self._endless.epoch(epoch)
        block = order.block_of(drawn)
        if self._entered == (epoch, block):
            return
        self._entered = (epoch, block)
        after, following = (epoch, block + 1) if block + 1 < order.num_blocks else (epoch + 1, 0)
        later = self._endless.epoch(after)
        ahead = later.shards_of(following).tolist() if following < later.num_blocks else []
        for number, cache in enumerate(self._caches):
            now = order.shards_of(block).tolist() if number == epoch % len(self._caches) else []
            cache.use(now, ahead if number == after % len(self._caches) else [])


def _order(shard_set: ShardSet, weights: Mapping[str, float], seed: int, block: int, shuffle: bool) -> Order:
    shards = shard_set.shards
    stored = sum(shard.samples for shard in shards)
    if stored != shard_set.stored:
        raise DataError(f"{shard_set.url}: its index has {stored} records, its manifest {shard_set.stored}; run its stage again.")
    each = [weights.get(shard.source, 1.0) for shard in shards]
    return Order([shard.samples for shard in shards], seed, each, shard_set.removed, block, shuffle)


def _limit(shard_set: ShardSet, order: Order, cache_bytes: int, processes: int) -> int:
    """The limit to give to streaming, which does not count shards that are being downloaded: ``cache_bytes`` minus room for these downloads.

    Raises:
        ConfigError: the limit is so low that shards fetched ahead would evict shards in use.
    """
    if not cache_bytes or not storage.is_remote(shard_set.url):
        return 0
    sizes = np.array([shard.bytes for shard in shard_set.shards], np.int64)
    first = order.epoch(0)
    largest = max((int(sizes[first.shards_of(block)].sum()) for block in range(first.num_blocks)), default=0)
    underway = 2 * processes * int(sizes.max())  # each process may download one shard to read and one ahead
    needed = max(min(int(sizes.sum()), 2 * largest), 4 * int(sizes.max())) + underway
    if cache_bytes < needed:
        raise ConfigError(
            f"data.cache_bytes = {cache_bytes}: {shard_set.url} needs {needed} on each node, for two blocks of {order.block} samples and the shards that "
            f"{processes} processes fetch; raise it (0: no limit) or lower data.shuffle_block."
        )
    return cache_bytes - underway


class SequentialReader(Generic[T, B]):
    """Batches for evaluation: at most ``limit`` records, evenly spaced over the set and dealt to ranks in turn. They are the same in every run and pass."""

    def __init__(
        self,
        shard_set: ShardSet,
        world: World,
        limit: int,
        batch: int,
        transform: Callable[[Record, int], T],
        collate: Callable[[list[T]], B],
        cache_dir: str | Path = "",
        mix_seed: int | None = None,
    ) -> None:
        """
        Args:
            shard_set: what to read.
            world: this process.
            limit: most records of all ranks together.
            batch: records of one batch of this rank; the last batch may be smaller.
            transform: called with (record, 0) -> sample.
            collate: samples -> batch.
            cache_dir: local folder for shards of a remote set; empty: the system's temporary folder.
            mix_seed: batch the samples in a random order, for measures that compare samples within a batch, because neighbouring records are often alike. All
                samples of this rank are then held in memory. None keeps the order of the set.

        Raises:
            DataError: the set's index is missing.
        """
        self._set, self._shards = shard_set, shard_set.shards
        self._batch, self._transform, self._collate, self._mix_seed = batch, transform, collate, mix_seed
        self._checked: set[int] = set()
        self._folder = storage.local_path(shard_set.url) if not storage.is_remote(shard_set.url) else self._make_cache(world, cache_dir)
        taken = min(limit, shard_set.count)
        self.indices = [position * shard_set.count // taken for position in range(world.rank, taken, world.size)]
        """Positions of this rank's records among the visible records of the set, ascending. The ranks' numbers of records differ by at most one."""

    def _make_cache(self, world: World, cache_dir: str | Path) -> Path:
        claim = Claim(World(world.rank, world.size, 0, 1), next(_serial), _cache_folder(cache_dir))
        weakref.finalize(self, claim.release)
        assert claim.cache is not None
        return claim.cache

    def __len__(self) -> int:
        """Number of batches of this rank."""
        return -(-len(self.indices) // self._batch)

    def __iter__(self) -> Iterator[B]:
        samples: Iterator[T] = (self._transform(record, 0) for record in self.records())
        if self._mix_seed is not None:
            held = list(samples)
            samples = (held[index] for index in generator(self._mix_seed, "evaluate", "mix").permutation(len(held)))
        while group := list(itertools.islice(samples, self._batch)):
            yield self._collate(group)

    def records(self) -> Iterator[Record]:
        """The records themselves.

        Raises:
            DataError: a shard file is missing or damaged; the message names it.
        """
        ends = np.cumsum([shard.samples for shard in self._shards], dtype=np.int64)
        if (named := int(ends[-1]) if len(ends) else 0) != self._set.stored:
            raise DataError(f"{self._set.url}: its index names {named} records, its manifest {self._set.stored}; run 'launcher.py validate' on it.")
        removed = self._set.removed
        stored = np.array(self.indices, np.int64)
        stored += np.searchsorted(removed - np.arange(len(removed)), stored, side="right")
        opened: tuple[int, ShardRows] | None = None
        for index in stored.tolist():
            number = int(np.searchsorted(ends, index, side="right"))
            if opened is None or opened[0] != number:
                opened = number, self._rows(number)
            yield opened[1][index - int(ends[number]) + self._shards[number].samples]

    def _rows(self, number: int) -> ShardRows:
        shard: Shard = self._shards[number]
        url, path = storage.join(self._set.url, shard.basename), self._folder / shard.basename
        if number not in self._checked:
            if storage.is_remote(url):
                fetch(url, shard.entry, path)
            else:
                check_local(url, shard.entry, path)
            self._checked.add(number)
        return ShardRows(path, shard.entry, url)


def image_collate(samples: list[Sample]) -> Batch:
    """Collate image samples: ids (list), pixels float32 [B, 3, H, W] in [0, 1], and, if they have captions, captions (list), text int64 [B, T] and lengths int64 [B]."""
    batch: Batch = {"ids": [sample["id"] for sample in samples], "pixels": to_pixels(np.stack([sample["pixels"] for sample in samples]))}
    if "caption" in samples[0]:
        batch["captions"] = [sample["caption"] for sample in samples]
    return batch | _texts(samples) if "text" in samples[0] else batch


READ = ("read_text", "read_codes")
"""What a model reads in place of text and codes, in the order in which it takes them; only where pieces or codes are replaced."""


def code_collate(samples: list[Sample]) -> Batch:
    """Collate code samples: ids (list), codes int64 [B, I], text int64 [B, T], lengths int64 [B]; and where samples have them read_text, read_codes, caption_keys int64
    [B] and own_keys (a list for each sample)."""
    stacked = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in ("codes", *READ) if name in samples[0]}
    batch = {"ids": [sample["id"] for sample in samples]} | stacked | _texts(samples)
    if "own_keys" in samples[0]:
        batch |= {"own_keys": [sample["own_keys"] for sample in samples], "caption_keys": torch.tensor([sample["caption_key"] for sample in samples])}
    return batch


def _texts(samples: list[Sample]) -> Batch:
    text_BT = torch.from_numpy(np.stack([sample["text"] for sample in samples]))
    return {"text": text_BT, "lengths": torch.tensor([sample["length"] for sample in samples])}


def to_pixels(pictures_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
