"""Shards of a set on this node, checked before use: StreamingDataset downloads, shares among processes and evicts; its order is not used.

Every shard file, local or downloaded, is read and hashed once on each node before a row of it is used. That costs a thousandth of decoding it, brings it
into the page cache, and is why no damaged file is ever trained on, whichever run left it there. Nothing here waits for another rank: a shard that another
process is preparing is waited for through a lock of the kernel's, so a process that fails or is killed gives the shard back.
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
from data_pipeline.shards.mosaic import FileInfo, MDSReader, ShardState, Stream, StreamingDataset
from data_pipeline.shards.rows import ShardRows, check_file
from data_pipeline.shards.shard_set import Shard, ShardSet
from infra import storage
from infra.errors import ConfigError, DataError
from infra.world import World

log = logging.getLogger(__name__)

FETCHES = 2
"""Downloads of a shard whose hash is wrong. Broken transfers are repeated by storage itself, with back-off."""
_OPEN_FILES = 256
_PATIENCE_S = 10.0  # for a download that is under way when the cache is closed
_FLOCK = "hhqqi4x"  # Linux's struct flock on 64 bits: type, whence, start, length, pid
_RETRIES = 8  # how often a shard may be evicted between its preparation and its opening


class DamagedShard(DataError):
    """A shard whose hash is wrong also when it is fetched again: trying once more is no use."""


def fetch(url: str, entry: dict[str, Any], path: Path) -> None:
    """Download a shard and check it; it appears at ``path`` when it is whole and right.

    Raises:
        DataError: it is missing, or cannot be read after retries; the object is named.
        DamagedShard: its hash is wrong, also when fetched again.
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
    """Check a shard of a local set.

    Raises:
        DataError: it is missing or cannot be read; the file is named.
        DamagedShard: its hash is wrong.
    """
    if not path.is_file():
        raise DataError(f"{url}: missing; run the stage that writes it again.")
    wrong = check_file(path, entry, url)
    if wrong:
        raise DamagedShard(f"{url}: damaged ({wrong}); delete its part and run the stage that wrote it again.")


def check_world(world: World) -> None:
    """Refuse a process whose environment, by which streaming finds its place, is of another rank; it would silently be rank 0 of 1.

    Raises:
        ConfigError: what the environment says.
    """
    found = mosaic.World.detect()
    if (found.rank, found.num_ranks, found.ranks_per_node) != (world.rank, world.size, world.local_size):
        raise ConfigError(
            f"this process is rank {world.rank} of {world.size} ({world.local_size} on this node), but its environment says rank {found.rank} of "
            f"{found.num_ranks} ({found.ranks_per_node} on this node): start ranks through launcher.py or torchrun, which set these variables."
        )


class _Stream(Stream):  # type: ignore[misc, unused-ignore]  # streaming ships no types
    """The files of one version of a set. The index is the version's, not the file index.json, and downloads go through our storage."""

    def __init__(self, shard_set: ShardSet, local: Path) -> None:
        remote = storage.is_remote(shard_set.url)
        super().__init__(remote=shard_set.url if remote else None, local=str(local), validate_hash="xxh64", keep_zip=False)
        self._set, self._folder, self._remote = shard_set, local, remote
        self._damaged: dict[str, DamagedShard] = {}

    def get_shards(self, world: mosaic.World, allow_unsafe_types: bool) -> list[MDSReader]:
        return [_file_of(shard, self.local) for shard in self._set.shards]

    def set_up_local(self, shards: list[MDSReader], cache_usage_per_shard: Any) -> None:
        """No shard counts as present: whatever lies there is checked before its first use."""

    def get_index_size(self) -> int:
        return 0

    def prepare_shard(self, shard: MDSReader) -> int:
        name = shard.raw_data.basename
        entry = {"raw_data": {"bytes": shard.raw_data.bytes, "hashes": shard.raw_data.hashes}}
        url, path = storage.join(self._set.url, name), self._folder / name
        # Asked here and not earlier: the thread that looks ahead may have found out while this one waited for its turn.
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
    raw = shard.entry["raw_data"]
    # Not MDSReader.from_json, which copies the whole entry: of 25,000 shards that is 0.1 GB in every process.
    return MDSReader(local, None, [], [], [], None, [], FileInfo(raw["basename"], raw["bytes"], raw["hashes"]), shard.samples, None, None)


@contextmanager
def _locked_byte(path: str, number: int, blocking: bool) -> Iterator[bool]:
    """One byte of a file, locked against all threads and processes; the kernel lets go of it with the process.

    Gives False if another has it and ``blocking`` is not set. FileLock would need a file for each of up to 25,000 shards.
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
        finally:  # closing is not enough: a process that was forked meanwhile has a copy of the descriptor
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, *place))
    finally:
        os.close(descriptor)


class _Dataset(StreamingDataset):  # type: ignore[misc, unused-ignore]
    """StreamingDataset whose shards are prepared one by one; a failure is an error here and now, not a silent end of an epoch."""

    cache_filelock = True
    """streaming asks for this name before it makes another lock for each call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._making, self._maker = threading.Lock(), -1

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        with self._making:  # one lock for both threads of a process: each process needs its own
            if self._maker != os.getpid():
                self._cache_filelock, self._maker = FileLock(self._cache_filelock_path), os.getpid()
        with _locked_byte(f"{self._cache_filelock_path}_shards", shard_id, blocking) as mine:
            if mine:
                self._prepare(shard_id)

    def _prepare(self, shard_id: int) -> None:
        """Prepare a shard that no other thread or process is preparing."""
        if self._shard_states[shard_id] == ShardState.PREPARING:
            self._shard_states[shard_id] = ShardState.REMOTE  # whoever was at it was killed, and streaming would wait for ever
        try:
            super().prepare_shard(shard_id)
        except Exception as error:
            self._shard_states[shard_id] = ShardState.REMOTE
            self._cache_filelock.release(force=True)
            if isinstance(error, ValueError) and not isinstance(error, ConfigError):  # streaming's word for a cache that is full of shards in use
                raise ConfigError(f"data.cache_bytes = {self.cache_limit}: {error}") from error
            raise

    def has(self, shard_id: int) -> bool:
        return bool(self._shard_states[shard_id] == ShardState.LOCAL)

    def touch(self, shards: Sequence[int]) -> None:
        """Note that shards are in use, so that others are evicted first."""
        if self.cache_limit:
            self._shard_access_times.numpy()[list(shards)] = time.time_ns()

    def release(self) -> None:
        """Let go of the segments of shared memory."""
        arrays = [self._shared_barrier._arr, self._next_epoch.arr, self._cache_usage.arr, self._shard_states, self._shard_access_times]
        for segment in [self._locals_shm, *(array.shm for array in arrays)]:
            segment.cleanup()


class ShardCache:
    """Opens shards of one set by number. Made by all ranks of a node together; used by each on its own, and by processes forked from it."""

    def __init__(self, shard_set: ShardSet, cache_dir: Path, world: World, serial: int, cache_bytes: int = 0) -> None:
        """
        Args:
            shard_set: what to read.
            cache_dir: where the folder for shards of an s3:// set is made; it is this job's own, and empty. Local sets are read in place.
            world: this process.
            serial: number of the loader, the same on all ranks.
            cache_bytes: limit of the cache on each node; 0: none.

        Raises:
            ConfigError: the limit has no room for four shards, or another job of this machine has the same identity.
        """
        self._set, self._remote = shard_set, storage.is_remote(shard_set.url)
        self._claim = Claim(world, serial, cache_dir if self._remote else None)
        folder = storage.local_path(shard_set.url) if self._claim.cache is None else self._claim.cache
        if dist.is_available() and dist.is_initialized():
            dist.barrier()  # nobody looks for segments before those of a killed group are gone
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
        self._round = 0  # of looking ahead; the thread of a former one ends

    @property
    def folder(self) -> Path:
        """Where the shard files are."""
        return self._folder

    def rows(self, shard: int) -> ShardRows:
        """A shard, ready to be read; it is waited for if it is on its way.

        Raises:
            DataError: it is missing, damaged, or cannot be downloaded; it is named.
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
            self._dataset.prepare_shard(shard)  # evicted, or deleted by somebody: it is here in name only
        raise DataError(
            f"{storage.join(self._set.url, this.basename)}: vanished from {self._folder} while in use; raise data.cache_bytes, or find who deletes there."
        )

    def use(self, now: Sequence[int], ahead: Iterable[int] = ()) -> None:
        """Say which shards are read from now on, and which ones after them: others are closed, and these are prepared in a thread."""
        for shard in set(self._open) - set(now):
            self._open.pop(shard).close()
        self._dataset.touch(now)
        self._round += 1
        wanted = [*now, *ahead]
        self._thread = threading.Thread(target=self._look_ahead, args=(self._round, wanted), name="look ahead", daemon=True)
        self._thread.start()

    def touch(self) -> None:
        """Note that the open shards are in use."""
        self._dataset.touch(list(self._open))

    def _look_ahead(self, this_round: int, shards: list[int]) -> None:
        for shard in shards:
            if self._round != this_round:
                return
            try:
                if not self._dataset.has(shard):
                    self._dataset.prepare_shard(shard, blocking=False)
            except Exception as error:
                # Whoever needs the shard tries again, and has the error then.
                if self._round == this_round:
                    log.warning("looking ahead: %s", error)
                return

    def close(self) -> None:
        """Close files, and in the process that opened the cache remove its shared memory and folder; again is fine."""
        self._round += 1
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)  # it may be amid a download into the folder that goes
        while self._open:
            self._open.popitem()[1].close()
        self._end()


def _let_go(dataset: _Dataset, claim: Claim, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker, which has a copy of all this
        dataset.release()
        claim.release()


@contextmanager
def _names_of(claim: Claim) -> Iterator[None]:
    """streaming looks for a free number from 0 on, among other jobs' segments; here it finds the claimed one only."""
    original = mosaic.prefix._each_prefix_int
    mosaic.prefix._each_prefix_int = lambda: iter([claim.number])
    try:
        yield
    finally:
        mosaic.prefix._each_prefix_int = original


@contextmanager
def _no_table_of_samples() -> Iterator[None]:
    """streaming would make a table of all samples (8 bytes each in every rank: 2 GB of 250 million) for an access that is not used here."""
    original = mosaic.dataset.Spanner
    mosaic.dataset.Spanner = lambda sizes: None
    try:
        yield
    finally:
        mosaic.dataset.Spanner = original
