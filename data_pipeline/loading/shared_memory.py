"""Names of loaders' shared memory on this machine: unique for each loader, so that what a killed loader left behind can be removed, and nothing else.

Each group of ranks on a node claims a number for each of its loaders, with which all names of the loader begin. The claim is a file in a folder of this user,
which the node's first rank keeps locked while it lives. A claim that nobody has locked is stale: its segments, lock files and cached shards are removed.
Anything without a claim (of other users, other programs that use streaming, containers that share /dev/shm) is never touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from infra.errors import ConfigError
from infra.world import World

log = logging.getLogger(__name__)

SEGMENTS = Path("/dev/shm")
"""The folder in which Linux shows segments of shared memory as files."""
LEAST_BYTES = 8 << 20
"""A loader does not start with less free shared memory."""
PATIENCE_S = 5.0
"""How long a claim waits for another process to release the lock on its file."""
_ADVICE = (
    "give it more room: docker run --shm-size=16g (or --ipc=host); Kubernetes: a volume 'emptyDir: {medium: Memory}' mounted at /dev/shm; "
    "elsewhere: mount -o remount,size=16g /dev/shm"
)


def check_room(needed: int = LEAST_BYTES, purpose: str = "the state of the loaders") -> None:
    """Refuse a machine whose shared memory is missing, read-only or too small, before a write to it ends the process with SIGBUS.

    Args:
        needed: bytes that must be free.
        purpose: what needs them, for the message.

    Raises:
        ConfigError: the message says what to change.
    """
    if not os.access(SEGMENTS, os.W_OK | os.X_OK):
        state = "cannot be written" if SEGMENTS.is_dir() else "does not exist"
        raise ConfigError(f"{SEGMENTS} {state}, and loaders need it; mount a tmpfs there: mount -t tmpfs -o size=16g,mode=1777 tmpfs {SEGMENTS}.")
    free = _free_bytes()
    if free < needed:
        raise ConfigError(f"{SEGMENTS} has {free / 2**20:.0f} MiB free, but {purpose} need {needed / 2**20:.0f} MiB; {_ADVICE}.")


def _free_bytes() -> int:
    found = os.statvfs(SEGMENTS)
    return found.f_bavail * found.f_frsize


class Claim:
    """The claim on a number, with which all names of one loader of one group of ranks on this node begin."""

    def __init__(self, world: World, serial: int, cache: Path | None = None) -> None:
        """
        Args:
            world: this process. Local rank 0 holds the claim, and removes what stale claims left behind.
            serial: number of the loader in this process, the same on all ranks.
            cache: parent of the loader's folder of cached shards, if it has one.

        Raises:
            ConfigError: another running job on this machine has the same identity.
        """
        environment = [os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")]
        if not environment[1]:  # without a port, groups are told apart by the parent process of their ranks
            environment.append(str(os.getppid()))
        alone = [str(os.getpid())] if world.local_size == 1 else []
        words = [*environment, *alone, str(os.getuid()), str(world.rank // world.local_size), str(serial)]
        self.key = hashlib.blake2b("\x1f".join(words).encode(), digest_size=6).hexdigest()
        self.cache = cache / f"loader-{self.key}" if cache is not None else None
        """Folder of cached shards, which only this claim uses."""
        self._held: int | None = None
        self._owner = os.getpid()
        if world.local_rank == 0:
            self._take()
            clean_stale()

    @property
    def number(self) -> int:
        """The number with which names in shared memory begin."""
        return int(self.key, 16)

    def _take(self) -> None:
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / self.key
        deadline = time.monotonic() + PATIENCE_S
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file(descriptor, path):  # else another process was just removing it as stale
                    break
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{path} is held by a running process: another job on this machine has the same MASTER_ADDR, MASTER_PORT and run id "
                    f"({os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}); start jobs through launcher.py, or give each its own port."
                )
            time.sleep(0.05)  # another process may hold it briefly, to remove stale claims
        self._held = descriptor
        _remove(descriptor, self.key)  # a killed group may have had the same key
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"cache": str(self.cache or "")}).encode(), 0)

    def release(self) -> None:
        """Remove the loader's segments and folder, and give the claim back. May be called again."""
        if self._held is not None and self._owner == os.getpid():  # not in a forked worker, which has a copy of this object
            descriptor, self._held = self._held, None
            _remove(descriptor, self.key)
            (_folder() / self.key).unlink(missing_ok=True)
            os.close(descriptor)


def clean_stale() -> list[str]:
    """Remove what killed loaders of this user left on this machine (segments, lock files, cached shards), and return their keys."""
    removed = []
    for path in sorted(_folder().glob("[0-9a-f]" * 12)):
        with suppress(OSError):  # removed by another process, or still held
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_file(descriptor, path):
                    _remove(descriptor, path.name)
                    path.unlink()
                    removed.append(path.name)
            finally:
                os.close(descriptor)
    if removed:
        log.debug("removed the shared memory of %d loaders that were killed", len(removed))
    return removed


def _remove(claim: int, key: str) -> None:
    """Remove the segments, lock files and cached shards of a claim that the caller holds."""
    for path in _names(key):
        path.unlink(missing_ok=True)
    with suppress(ValueError):  # the file is empty if its holder was killed before it wrote to it
        cache = json.loads(os.pread(claim, 1 << 16, 0))["cache"]
        if cache and Path(cache).name == f"loader-{key}":
            shutil.rmtree(cache, ignore_errors=True)


def _names(key: str) -> Iterator[Path]:
    for folder in (SEGMENTS, Path(tempfile.gettempdir())):
        yield from folder.glob(f"{int(key, 16):06}_*")


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"loader-claims-{os.getuid()}"


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the file at that path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
