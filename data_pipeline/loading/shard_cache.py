"""The shards of a set on this node, verified before use. StreamingDataset downloads, evicts and shares them among processes; its order is not used.

Every shard file, local or downloaded, is read and hashed once on each node before any row of it is used. That costs a thousandth of the time to decode it,
brings it into the page cache, and ensures that no damaged file is trained on, whichever run left it there. No rank depends on another one being alive: a
process waits for a shard that another process is preparing with a kernel lock, which the kernel releases if that process fails or is killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock

from data_pipeline.loading.shared_memory import Claim
from data_pipeline.shards import mosaic
from data_pipeline.shards.index import Shard
from data_pipeline.shards.mosaic import FileInfo, MDSReader, ShardState, Stream, StreamingDataset
from data_pipeline.shards.rows import ShardRows, check_file
from data_pipeline.shards.shard_set import ShardSet
from infra import storage
from infra.errors import ConfigError, DataError
from infra.world import World

log = logging.getLogger(__name__)

FETCHES = 2
"""How often a shard is downloaded if its hash is wrong. Transfers that break off are retried by the storage layer itself, with back-off."""
_OPEN_FILES = 256
_PATIENCE_S = 10.0  # wait for a download that is under way when the cache is closed
_FLOCK = "hhqqi4x"  # Linux's struct flock on 64 bits: type, whence, start, length, pid
_RETRIES = 8  # how often a shard may be evicted between being prepared and being opened


class DamagedShard(DataError):
    """A shard whose hash is wrong even after a second download, so that further tries are pointless."""


def fetch(url: str, entry: dict[str, Any], path: Path) -> None:
    """Download a shard and verify it; it appears at ``path`` once it is complete and its hash is right.

    Raises:
        DataError: it is missing, or cannot be read after retries; the message names the object.
        DamagedShard: its hash is wrong, even after another download.
    """
    arriving = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    for attempt in range(1, FETCHES + 1):
        try:
            storage.download_file(url, arriving)
            wrong = check_file(arriving, entry, url)
            if not wrong:
                arriving.replace(path)
                return
        finally:
            arriving.unlink(missing_ok=True)
        log.warning("%s: %s, in download %d of %d", url, wrong, attempt, FETCHES)
    raise DamagedShard(f"{url}: damaged ({wrong}), also when fetched again; delete its part and run the stage that wrote it again.")


def check_local(url: str, entry: dict[str, Any], path: Path) -> None:
    """Verify a shard of a local set.

    Raises:
        DataError: it is missing or cannot be read; the message names the file.
        DamagedShard: its hash is wrong.
    """
    if not path.is_file():
        raise DataError(f"{url}: missing; run the stage that writes it again.")
    wrong = check_file(path, entry, url)
    if wrong:
        raise DamagedShard(f"{url}: damaged ({wrong}); delete its part and run the stage that wrote it again.")


def check_world(world: World) -> None:
    """Refuse a process whose environment describes another rank: streaming reads its rank there, and without variables it silently takes rank 0 of 1.

    Raises:
        ConfigError: they differ; the message says what the environment describes.
    """
    found = mosaic.World.detect()
    if (found.rank, found.num_ranks, found.ranks_per_node) != (world.rank, world.size, world.local_size):
        raise ConfigError(
            f"this process is rank {world.rank} of {world.size} ({world.local_size} on this node), but its environment says rank {found.rank} of "
            f"{found.num_ranks} ({found.ranks_per_node} on this node): start ranks through launcher.py or torchrun, which set these variables."
        )


class _Files(Sequence[MDSReader]):
    """The shards as streaming knows them, each made when it is asked for: a hundred thousand of them take 0.1 GB in every process."""

    def __init__(self, shards: Sequence[Shard] = (), local: str = "") -> None:
        self._shards, self._local = shards, local

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return _Files(self._shards[place], self._local)
        return _file_of(self._shards[place], self._local)

    def __iadd__(self, others: _Files) -> _Files:
        """The shards of the only stream, which streaming adds to none."""
        assert not self._shards
        return others


class _Stream(Stream):  # type: ignore[misc, unused-ignore]  # streaming ships no types
    """The files of one version of a set. Its index is that of the version and not the file index.json, and downloads use our storage layer."""

    def __init__(self, shard_set: ShardSet, local: Path) -> None:
        remote = storage.is_remote(shard_set.url)
        super().__init__(remote=shard_set.url if remote else None, local=str(local), validate_hash="xxh64", keep_zip=False)
        self._set, self._folder, self._remote = shard_set, local, remote
        self._damaged: dict[str, DamagedShard] = {}

    def get_shards(self, world: mosaic.World, allow_unsafe_types: bool) -> _Files:
        return _Files(self._set.shards, self.local)

    def set_up_local(self, shards: list[MDSReader], cache_usage_per_shard: Any) -> None:
        """Overridden to do nothing: no shard counts as present, so that every file is verified before its first use."""

    def get_index_size(self) -> int:
        return 0

    def prepare_shard(self, shard: MDSReader) -> int:
        name = shard.raw_data.basename
        entry = {"raw_data": {"bytes": shard.raw_data.bytes, "hashes": shard.raw_data.hashes}}
        url, path = storage.join(self._set.url, name), self._folder / name
        # Checked here and not earlier: the thread that looks ahead may have found the damage while this thread waited for the lock.
        if name in self._damaged:
            raise self._damaged[name]
        try:
            if not self._remote:
                check_local(url, entry, path)
                return 0
            fetch(url, entry, path)
            return int(shard.raw_data.bytes)
        except DamagedShard as error:
            self._damaged[name] = error
            raise


def _file_of(shard: Shard, local: str) -> MDSReader:
    # Not MDSReader.from_json, which wants the whole entry.
    return MDSReader(local, None, [], [], [], None, [], FileInfo(shard.basename, shard.bytes, shard.hashes), shard.samples, None, None)


@contextmanager
def _locked_byte(path: str, number: int, blocking: bool) -> Iterator[bool]:
    """Lock one byte of a file against all threads and processes; the kernel releases the lock when the process ends.

    Yields False if it is locked already and ``blocking`` is not set. FileLock would need a file for each of up to 25,000 shards.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    place = (os.SEEK_SET, number, 1, 0)
    try:
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if blocking else fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, *place))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:  # closing the descriptor is not enough, because a process that was forked meanwhile has a copy of it
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, *place))
    finally:
        os.close(descriptor)


class _Dataset(StreamingDataset):  # type: ignore[misc, unused-ignore]
    """A StreamingDataset whose shards are prepared one by one, and where a failure raises an error at once instead of ending the epoch silently."""

    cache_filelock = True
    """If an attribute of this name exists, streaming does not make a new lock for each call."""

    def __init__(self, **options: Any) -> None:
        self._files = _Files()
        super().__init__(**options)
        self._making, self._maker = threading.Lock(), -1

    @property
    def shards(self) -> _Files:
        return self._files

    @shards.setter
    def shards(self, found: _Files | list[MDSReader]) -> None:
        """Streaming begins with an empty list, and adds the shards of each stream."""
        self._files = found if isinstance(found, _Files) else _Files()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        with self._making:  # a forked process needs a FileLock of its own, which both of its threads share
            if self._maker != os.getpid():
                self._cache_filelock, self._maker = FileLock(self._cache_filelock_path), os.getpid()
        with _locked_byte(f"{self._cache_filelock_path}_shards", shard_id, blocking) as mine:
            if mine:
                self._prepare(shard_id)

    def _prepare(self, shard_id: int) -> None:
        """Prepare a shard that no other thread or process is preparing."""
        if self._shard_states[shard_id] == ShardState.PREPARING:
            self._shard_states[shard_id] = ShardState.REMOTE  # the process that was preparing it was killed; streaming would wait for it for ever
        try:
            super().prepare_shard(shard_id)
        except Exception as error:
            self._shard_states[shard_id] = ShardState.REMOTE
            self._cache_filelock.release(force=True)
            if isinstance(error, ValueError) and not isinstance(error, ConfigError):  # streaming raises it if the cache is full of shards in use
                raise ConfigError(f"data.cache_bytes = {self.cache_limit}: {error}") from error
            raise

    def has(self, shard_id: int) -> bool:
        return bool(self._shard_states[shard_id] == ShardState.LOCAL)

    def touch(self, shards: Sequence[int]) -> None:
        """Mark shards as in use, so that others are evicted first."""
        if self.cache_limit:
            self._shard_access_times.numpy()[list(shards)] = time.time_ns()

    def release(self) -> None:
        """Release the segments of shared memory."""
        arrays = [self._shared_barrier._arr, self._next_epoch.arr, self._cache_usage.arr, self._shard_states, self._shard_access_times]
        for segment in [self._locals_shm, *(array.shm for array in arrays)]:
            segment.cleanup()


class ShardCache:
    """Opens shards of one set by number. All ranks of a node construct it together; then each uses it independently, as do processes forked from the rank."""

    def __init__(self, shard_set: ShardSet, cache_dir: Path, world: World, serial: int, cache_bytes: int = 0) -> None:
        """
        Args:
            shard_set: what to read.
            cache_dir: where the folder for shards of a remote set is made, which is empty and used by this job only. Local sets are read in place.
            world: this process.
            serial: number of the loader, the same on all ranks.
            cache_bytes: limit of the cache on each node; 0: no limit.

        Raises:
            ConfigError: the limit is too low for four shards, or another job on this machine has the same identity.
        """
        self._set, self._remote = shard_set, storage.is_remote(shard_set.url)
        self._claim = Claim(world, serial, cache_dir if self._remote else None)
        folder = storage.local_path(shard_set.url) if self._claim.cache is None else self._claim.cache
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # segments of a killed group must be removed before any rank looks for segments
        try:
            with _names_of(self._claim), _no_table_of_samples():
                self._dataset = _Dataset(
                    streams=[_Stream(shard_set, folder)],
                    num_canonical_nodes=1,
                    batch_size=1,
                    predownload=1,
                    cache_limit=cache_bytes if self._remote and cache_bytes else None,
                )
        except ValueError as error:
            self._claim.release()
            if not cache_bytes:
                raise
            raise ConfigError(f"data.cache_bytes = {cache_bytes}: {error}") from error
        self._folder = folder
        self._open: OrderedDict[int, ShardRows] = OrderedDict()
        self._end = weakref.finalize(self, _let_go, self._dataset, self._claim, os.getpid())
        self._thread: threading.Thread | None = None
        self._round = 0  # counts calls of ``use``; a thread that looks ahead for an earlier call ends

    @property
    def folder(self) -> Path:
        """Where the shard files are."""
        return self._folder

    def rows(self, shard: int) -> ShardRows:
        """A shard, ready to be read; waits for it if it is being downloaded.

        Raises:
            DataError: it is missing, damaged, or cannot be downloaded; the message names it.
        """
        found = self._open.get(shard)
        if found is None:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            found = self._open[shard] = self._prepared(shard)
        return found

    def _prepared(self, shard: int) -> ShardRows:
        this = self._set.shards[shard]
        for _ in range(_RETRIES):
            while not self._dataset.has(shard):
                self._dataset.prepare_shard(shard)
            with suppress(FileNotFoundError):
                return ShardRows(self._folder / this.basename, this.entry, storage.join(self._set.url, this.basename))
            if not self._remote:
                break
            self._dataset.prepare_shard(shard)  # its state says that it is here, but it was evicted, or somebody has deleted it
        raise DataError(
            f"{storage.join(self._set.url, this.basename)}: vanished from {self._folder} while in use; raise data.cache_bytes, or find who deletes there."
        )

    def use(self, now: Sequence[int], ahead: Iterable[int] = ()) -> None:
        """Say which shards will be read from now on, and which ones after them. All others are closed; these are prepared by a thread."""
        for shard in set(self._open) - set(now):
            self._open.pop(shard).close()
        self._dataset.touch(now)
        self._round += 1
        wanted = [*now, *ahead]
        self._thread = threading.Thread(target=self._look_ahead, args=(self._round, wanted), name="look ahead", daemon=True)
        self._thread.start()

    def touch(self) -> None:
        """Mark the open shards as in use."""
        self._dataset.touch(list(self._open))

    def _look_ahead(self, this_round: int, shards: list[int]) -> None:
        for shard in shards:
            if self._round != this_round:
                return
            try:
                if not self._dataset.has(shard):
                    self._dataset.prepare_shard(shard, blocking=False)
            except Exception as error:
                # Not raised: when the shard is needed it is prepared again, and the error appears then.
                if self._round == this_round:
                    log.warning("looking ahead: %s", error)
                return

    def close(self) -> None:
        """Close files; in the process that made the cache, remove its shared memory and folder, too. May be called again."""
        self._round += 1
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)  # it may be downloading into the folder that is about to be removed
        while self._open:
            self._open.popitem()[1].close()
        self._end()


def _let_go(dataset: _Dataset, claim: Claim, owner: int) -> None:
    if os.getpid() == owner:  # not in a forked worker, which has a copy of this finalizer
        dataset.release()
        claim.release()


@contextmanager
def _names_of(claim: Claim) -> Iterator[None]:
    """Let streaming use the claimed number for its segments. By itself it would search for a free number from 0 on, among other jobs' segments."""
    original = mosaic.prefix._each_prefix_int
    mosaic.prefix._each_prefix_int = lambda: iter([claim.number])
    try:
        yield
    finally:
        mosaic.prefix._each_prefix_int = original


@contextmanager
def _no_table_of_samples() -> Iterator[None]:
    """Keep streaming from building a table of all samples, which we do not use (8 bytes a sample in every rank: 2 GB for 250 million)."""
    original = mosaic.dataset.Spanner
    mosaic.dataset.Spanner = lambda sizes: None
    try:
        yield
    finally:
        mosaic.dataset.Spanner = original
