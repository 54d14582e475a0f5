"""Loaders: shard sets to batches, in one global order for any number of ranks. StreamingDataset underneath; torch in collation only.

The global order is an endless sequence: epoch 0 of set 0, epoch 1 of set 1, ... (set e mod number of sets), each epoch a shuffle of all its records,
each record exactly once. Global batch k is positions [k B, (k + 1) B) of that sequence; rank r of R takes every R-th position, from r on. Batches
run across the ends of epochs: nothing is dropped, padded or repeated, and one integer, the number of samples drawn, is the whole state. So a run
resumes to the sample, on any number of ranks.

StreamingDataset would repeat samples at the end of an epoch until they divide over the ranks. ``_Epochs`` therefore asks it for the order of one
rank, and takes the rank's positions from that; shards, cache, downloads and shared memory are StreamingDataset's own.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format.mds.reader import MDSReader
from streaming.base.shared import prefix as streaming_prefix
from streaming.base.world import World as StreamingWorld
from torch import Tensor

from data_pipeline.shards import INDEX, ShardSet
from data_pipeline.transforms import Record, Sample, code_transform, dvae_transform, pair_transform, view_transform
from infra import storage
from infra.errors import ConfigError, DataError
from infra.seeds import derive, generator
from infra.world import World

__all__ = [
    "SequentialReader",
    "ShardLoader",
    "code_collate",
    "code_transform",
    "dvae_transform",
    "image_collate",
    "pair_transform",
    "to_pixels",
    "view_transform",
]

log = logging.getLogger(__name__)

T = TypeVar("T")
B = TypeVar("B")
Batch = dict[str, Any]

_SHUFFLE_BLOCK = 1 << 18  # samples among which a sample may move
_serial = itertools.count()  # loaders are made in the same order on every rank, so this number is the same on all of them


class _DaemonThreads:
    """What StreamingDataset needs of an executor. Python joins a ThreadPoolExecutor's threads at exit, and in mid-epoch they never end."""

    def submit(self, function: Callable[..., object], *arguments: Any) -> Future[object]:
        future: Future[object] = Future()

        def work() -> None:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future


class _Epochs(StreamingDataset):  # type: ignore[misc, unused-ignore]  # streaming ships no types
    """A StreamingDataset that is told where to start: epoch, and which positions of its order are this rank's."""

    place: tuple[int, int, int] = (0, 0, 1)
    """Epoch, first position, stride."""

    def _resume_incr_epoch(self) -> tuple[int, int]:
        return self.place[0], 0

    def _get_work(self, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
        # A world of one rank: every sample once, without the repeats that make ranks equal.
        self._parallel_worker_world = StreamingWorld(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)
        order: NDArray[np.int64] = super()._get_work(epoch, sample_in_epoch)
        _, first, stride = self.place
        return order[first::stride]

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        # The look-ahead thread comes by for every sample. Without eviction a shard that is here stays here, so it needs no file lock.
        if blocking or self.cache_limit or self._shard_states[shard_id] != _ShardState.LOCAL:
            super().prepare_shard(shard_id, blocking)

    @property
    def failed(self) -> bool:
        """Whether a thread failed: iteration then just ends (in streaming 0.13)."""
        return hasattr(self, "_event") and self._event.is_set()


@contextmanager
def _own_shared_memory(world: World, serial: int) -> Iterator[str]:
    """Names in shared memory that belong to this process group: no other job's are looked at, waited for or removed. Yields the group's key."""
    environment = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
    if not environment[1]:  # no port to tell groups apart: ranks of one node have their parent in common
        environment.append(str(os.getppid()))
    alone = [str(os.getpid())] if world.local_size == 1 else []
    words = [*environment, *alone, str(os.getuid()), str(world.rank // world.local_size), str(serial)]
    key = hashlib.blake2b("\x1f".join(words).encode(), digest_size=6).hexdigest()
    original = streaming_prefix._each_prefix_int
    streaming_prefix._each_prefix_int = lambda: itertools.count(int(key, 16))
    try:
        yield key
    finally:
        streaming_prefix._each_prefix_int = original


def _check_world(world: World) -> None:
    found = StreamingWorld.detect()
    if (found.rank, found.num_ranks, found.ranks_per_node) != (world.rank, world.size, world.local_size):
        raise ConfigError(
            f"this process is rank {world.rank} of {world.size} ({world.local_size} on this node), but its environment says rank {found.rank} of "
            f"{found.num_ranks} ({found.ranks_per_node} on this node): start ranks through launcher.py or torchrun, which set these variables."
        )


def _cache_folder(place: str | Path) -> Path:
    """A run folder may itself be on S3; shards are cached on this machine in any case."""
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
    ) -> None:
        """
        Args:
            sets: epoch e reads sets[e mod len(sets)].
            cache_dir: folder for shards of s3:// sets (the system's temporary folder if this is no local path); each loader of each process group
                makes its own sub-folder. Local sets are read in place.
            world: this process; all ranks make the same loaders in the same order.
            batch: samples of one global batch.
            seed: run.seed.
            transform: (record, epoch) -> sample.
            collate: samples of this rank -> batch.
            shuffle: False keeps the order of the records.
            batch_key: the configuration's name of ``batch``, for messages.

        Raises:
            ConfigError: the batch does not divide over the ranks, or the environment has other ranks.
            DataError: no set, or an empty one.
        """
        if batch % world.size:
            raise ConfigError(f"{batch_key} = {batch} does not divide over {world.size} processes; use a multiple of {world.size}.")
        empty = [shard_set.url for shard_set in sets if not shard_set.count]
        if not sets or empty:
            raise DataError(
                f"nothing to load: {', '.join(empty) + ' has no records' if empty else 'no shard set was given'}; run the stage that writes it again."
            )
        _check_world(world)
        self.sets = list(sets)
        self._world, self._batch, self._seed, self._shuffle = world, batch, seed, shuffle
        self._transform, self._collate = transform, collate
        self._counts = [shard_set.count for shard_set in sets]
        self._datasets = [self._open(shard_set, _cache_folder(cache_dir)) for shard_set in sets]
        self._drawn = 0  # samples of the global order
        self._records: Iterator[tuple[Record, int]] | None = None

    def _open(self, shard_set: ShardSet, cache_dir: Path) -> _Epochs:
        remote = storage.is_remote(shard_set.url)
        with _own_shared_memory(self._world, next(_serial)) as key:
            local = cache_dir / f"{shard_set.content_hash[:16]}-{key}" if remote else storage.local_path(shard_set.url)
            if remote and self._world.local_rank == 0:
                shutil.rmtree(local, ignore_errors=True)  # a former attempt's shards: present files are not checked again
            dataset = _Epochs(
                remote=shard_set.url if remote else None,
                local=str(local),
                validate_hash="xxh64" if remote else None,
                num_canonical_nodes=1,
                batch_size=1,
                predownload=4096,
                shuffle=self._shuffle,
                shuffle_seed=derive(self._seed, "order") % 2**31,
                shuffle_block_size=_SHUFFLE_BLOCK,
            )
        dataset._executor = _DaemonThreads()
        if dataset.num_samples != shard_set.count:
            raise DataError(f"{shard_set.url}: its index has {dataset.num_samples} records, its manifest {shard_set.count}; run its stage again.")
        return dataset

    def next(self) -> B:
        """The next batch of this rank: ``batch / world.size`` samples.

        Raises:
            DataError: shards are missing or damaged. Nothing is skipped.
        """
        if self._records is None:
            self._records = self._run()
        samples = [self._transform(*pair) for pair in itertools.islice(self._records, self._batch // self._world.size)]
        self._drawn += self._batch
        return self._collate(samples)

    @property
    def epoch(self) -> int:
        """Epoch of the next batch's first sample."""
        return self._locate(self._drawn)[0]

    def state(self) -> dict[str, Any]:
        """Where the loader stands; JSON-able, the same on every rank, and valid on any number of ranks."""
        return {"samples": self._drawn, "seed": self._seed, "shuffle": self._shuffle, "sets": [shard_set.content_hash for shard_set in self.sets]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken.

        Raises:
            DataError: the state belongs to other shard sets, another seed or another order.
        """
        now = self.state()
        differing = [name for name in ("seed", "shuffle", "sets") if state.get(name) != now[name]]
        if differing:
            parts = "; ".join(f"{name}: {state.get(name)} in the checkpoint, {now[name]} now" for name in differing)
            raise DataError(
                f"the loader's position is of another order of samples ({parts}); go back to those shard sets and that seed, or start the stage anew."
            )
        self._drawn = int(state["samples"])
        self._records = None

    def _locate(self, samples: int) -> tuple[int, int]:
        """Position in the endless order -> (epoch, position in the epoch)."""
        cycles, rest = divmod(samples, sum(self._counts))
        epoch = cycles * len(self.sets)
        while rest >= self._counts[epoch % len(self.sets)]:
            rest -= self._counts[epoch % len(self.sets)]
            epoch += 1
        return epoch, rest

    def _run(self) -> Iterator[tuple[Record, int]]:
        rank, size = self._world.rank, self._world.size
        epoch, start = self._locate(self._drawn)
        position = self._drawn  # of the epoch's entry point, in the endless order
        while True:
            count = self._counts[epoch % len(self.sets)]
            first = start + (rank - position) % size
            for record in self._epoch(epoch, first, len(range(first, count, size))):
                yield record, epoch
            position += count - start
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int, first: int, expected: int) -> Iterator[Record]:
        shard_set, dataset = self.sets[epoch % len(self.sets)], self._datasets[epoch % len(self.sets)]
        dataset.place = (epoch, first, self._world.size)
        found = 0
        try:
            for record in dataset:
                found += 1
                yield record
        except (RuntimeError, OSError) as error:
            raise DataError(f"{shard_set.url}: reading stopped after {found} of {expected} samples of this rank, epoch {epoch} ({error}).") from error
        if found != expected or dataset.failed:
            raise DataError(
                f"{shard_set.url}: epoch {epoch} ended after {found} of {expected} samples of this rank; "
                "a shard is missing, damaged or cannot be downloaded (the log above names it). Run the stage that wrote it again, or check the storage."
            )


class SequentialReader(Generic[T, B]):
    """Batches for evaluation: at most ``limit`` records, evenly spaced over the set, dealt to ranks in turn; the same ones in every run and pass."""

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
            limit: records of all ranks together.
            batch: records of one batch of this rank; the last may be smaller.
            transform: (record, 0) -> sample.
            collate: samples -> batch.
            cache_dir: local folder for shards of an s3:// set; empty: the system's temporary folder.
            mix_seed: batches of a random order (all samples of this rank are held in memory), for measures that compare the samples of a batch: records
                that stand together are alike. None keeps the order of the set.

        Raises:
            DataError: the set's index is missing.
        """
        self._set, self._cache = shard_set, _cache_folder(cache_dir)
        self._batch, self._transform, self._collate, self._mix_seed = batch, transform, collate, mix_seed
        self._shards = storage.read_json(storage.join(shard_set.url, INDEX))["shards"]
        taken = min(limit, shard_set.count)
        self.indices = [position * shard_set.count // taken for position in range(world.rank, taken, world.size)]
        """Positions in the set of this rank's records, ascending. Ranks' numbers differ by at most one."""

    def __len__(self) -> int:
        """Batches of this rank."""
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
            DataError: a shard file is missing.
        """
        ends = np.cumsum([shard["samples"] for shard in self._shards])
        opened: tuple[int, MDSReader] | None = None
        for index in self.indices:
            number = int(np.searchsorted(ends, index, side="right"))
            if opened is None or opened[0] != number:
                opened = number, self._reader(self._shards[number])
            yield opened[1][index - int(ends[number]) + self._shards[number]["samples"]]

    def _reader(self, shard: dict[str, Any]) -> MDSReader:
        basename = shard["raw_data"]["basename"]
        if not storage.is_remote(self._set.url):
            folder = storage.local_path(self._set.url)
            if not (folder / basename).is_file():
                raise DataError(f"{storage.join(self._set.url, basename)}: missing; run the stage that writes {self._set.url} again.")
        else:
            folder = self._cache / f"{self._set.content_hash[:16]}-evaluation-{os.getpid()}"
            if not (folder / basename).is_file():
                (folder / basename).parent.mkdir(parents=True, exist_ok=True)
                storage.download_file(storage.join(self._set.url, basename), folder / basename)
        return MDSReader.from_json(str(folder), None, shard)


def image_collate(samples: list[Sample]) -> Batch:
    """Samples of images -> ids (list), pixels float32 [B, 3, H, W] in [0, 1], and with captions text int64 [B, T] and lengths int64 [B]."""
    batch: Batch = {"ids": [sample["id"] for sample in samples], "pixels": to_pixels(np.stack([sample["pixels"] for sample in samples]))}
    return batch | _texts(samples) if "text" in samples[0] else batch


def code_collate(samples: list[Sample]) -> Batch:
    """Samples of codes -> ids (list), codes int64 [B, I], text int64 [B, T], lengths int64 [B]."""
    codes_BI = torch.from_numpy(np.stack([sample["codes"] for sample in samples]))
    return {"ids": [sample["id"] for sample in samples], "codes": codes_BI} | _texts(samples)


def _texts(samples: list[Sample]) -> Batch:
    text_BT = torch.from_numpy(np.stack([sample["text"] for sample in samples]))
    return {"text": text_BT, "lengths": torch.tensor([sample["length"] for sample in samples])}


def to_pixels(pictures_BHWC: NDArray[np.uint8]) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(pictures_BHWC).permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)
