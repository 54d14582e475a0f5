"""Temporary folders on this node. Each is deleted at the end of its block; the next launcher deletes those of killed processes when it starts."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self

from infra import environment
from infra.errors import ConfigError


@contextmanager
def folder(prefix: str) -> Iterator[str]:
    """A temporary folder for the block. Its process holds a lock on it, which the kernel releases however the process ends."""
    with closing(Folder(prefix)) as made:
        yield made.name


class Folder:
    """A temporary folder that is not bound to a block; delete it with ``close``."""

    def __init__(self, prefix: str) -> None:
        with _locked(_home()) as home:
            self.name = tempfile.mkdtemp(prefix=prefix, dir=home)
            self._lock = _lock(self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the folder; may be called more than once."""
        lock, self._lock = self._lock, None
        if lock is not None:
            shutil.rmtree(self.name, ignore_errors=True)
            os.close(lock)


def sweep() -> list[str]:
    """Delete the folders of processes that no longer exist; returns the folders' names."""
    home = _home()
    with _locked(home):  # nobody is between making a folder and locking it
        dead = {name: lock for name in sorted(os.listdir(home)) if (lock := _lock(os.path.join(home, name), wait=False)) is not None}
    for name, lock in dead.items():
        shutil.rmtree(os.path.join(home, name), ignore_errors=True)
        os.close(lock)
    return list(dead)


def _home() -> str:
    """The folder that holds all temporary folders of this user.

    Raises:
        ConfigError: a folder of that name belongs to somebody else.
    """
    place = environment.temporary() / f"launcher-{os.getuid()}"
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{place}: belongs to somebody else; delete it, or set TMPDIR to a folder of your own.")
    return str(place)


@contextmanager
def _locked(place: str) -> Iterator[Path]:
    lock = _lock(place)
    try:
        yield Path(place)
    finally:
        if lock is not None:
            os.close(lock)


def _lock(place: str, *, wait: bool = True) -> int | None:
    """Lock a folder and return the descriptor that holds the lock; with ``wait=False``, None if another process holds it.

    On a file system without locks, an owner gets a descriptor that locks nothing, and ``sweep`` gets None: there, leftovers are not deleted.
    """
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(descriptor)
            return None
    return descriptor
