"""Local files that appear whole or not at all, and errors that name the file. Other modules use ``infra/storage.py``."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import IO

from infra import kept_within
from infra.errors import ConfigError, DataError, MissingError, NoRoomError

log = logging.getLogger(__name__)

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
_CONTENT_S = 5.0  # wait for a rival to write its few hundred bytes
WITH_OUT = "choose a writable place with --out"
"""For ``elsewhere``: of commands with that option."""
_ADVICE = ContextVar("where else to write", default="")
TEMPORARY = ".tmp-"
"""Prefix of the names of files that are being written; listings leave them out."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, in hexadecimal.

    Raises:
        DataError: it is missing or cannot be read.
    """
    with read_errors(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def read_errors(name: str) -> Iterator[None]:
    """Turn an OSError into a DataError that names the file; a MissingError if the file does not exist."""
    try:
        yield
    except OSError as error:
        # NotADirectoryError: 'file/name' does not exist, but a file that is opened as a folder does.
        if isinstance(error, FileNotFoundError) or (isinstance(error, NotADirectoryError) and not os.path.lexists(name)):
            raise MissingError(f"{name}: does not exist.") from error
        raise DataError(f"{name}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise MissingError(f"{name}: no name of a file, for it holds a null character.") from error


LARGEST_WHOLE = 8 << 30
"""Bytes of a file that is read whole; a file of terabytes may take no disk at all."""


def regular(path: Path, name: str, most: int = 0) -> Path:
    """A file to be opened, where there is one; a folder says itself that it is none.

    Args:
        most: bytes that it may have; 0: any number.

    Raises:
        DataError: something else is there (a pipe may block for ever, and a device may have no end), or it is larger.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(f"{name}: not a regular file.")
    if most and path.is_file() and path.stat().st_size > most:
        raise DataError(f"{name}: larger than {most:,} bytes, and such files are read whole; it is damaged, or was not written by this project.")
    return path


def is_file(path: Path) -> bool:
    """Whether there is such a file; a name too long for any has none."""
    with _too_long_is_none():
        return path.is_file()
    return False


def is_folder(path: Path) -> bool:
    """Whether there is such a folder; a name too long for any has none."""
    with _too_long_is_none():
        return path.is_dir()
    return False


@contextmanager
def _too_long_is_none() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise


@contextmanager
def elsewhere(advice: str) -> Iterator[None]:
    """For the block, what is said of a place that cannot be written to: not every command puts its files where run.root says."""
    token = _ADVICE.set(advice)
    try:
        yield
    finally:
        _ADVICE.reset(token)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names the path; a NoRoomError if the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not from the file system: a time-out of the network connection that feeds the file is an OSError, too
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoRoomError(
                f"{path}: cannot be written ({error.strerror}); make room there, or {_ADVICE.get() or 'choose another place with run.root or TMPDIR'}."
            ) from error
        advice = _ADVICE.get() or "choose a writable place, for example with run.root"
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); {advice}.") from error


@contextmanager
def atomic(path: Path, origin: str = "", sha256: str = "") -> Iterator[IO[bytes]]:
    """A temporary file beside ``path`` that is synced and renamed to ``path`` when the block ends without an error; otherwise it is deleted.

    Args:
        path: the file to write; missing folders are made.
        origin: where the content comes from, for messages.
        sha256: expected hash of the content; empty: any.

    Raises:
        DataError: the content has another hash.
        ConfigError: the place is not writable, or a link leads out of the run folder.
    """
    kept_within.check(path)
    temporary = _beside(path)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            found = sha256_file(temporary) if sha256 else ""
            if found != sha256:
                raise DataError(f"{origin}: damaged: its SHA-256 is {found}, expected {sha256}. Delete it and run the stage that wrote it again.")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def create_once(path: Path, data: bytes) -> bool:
    """Create a file with content unless it exists: of any number of racing callers exactly one gets True.

    Raises:
        ConfigError: the place is not writable.
    """
    beside = _beside(path)
    with atomic(beside) as file:
        file.write(data)
    with write_errors(path):
        try:
            os.link(beside, path)  # unlike with O_EXCL, the file has its content from its first moment
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            log.warning(
                "%s: the file system (%s) knows no hard links: files are created there as on S3", path.parent, kind_of_mount(str(path.parent))
            )
            return _create_exclusively(path, data)
        finally:
            beside.unlink(missing_ok=True)
        _sync_folder(path.parent)
    return True


def _create_exclusively(path: Path, data: bytes) -> bool:
    """``create_once`` without hard links: a rival may see the file before its content, and waits for the content."""
    try:
        with path.open("xb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
    except FileExistsError:
        deadline = time.monotonic() + _CONTENT_S
        while not path.stat().st_size and data and time.monotonic() < deadline:
            time.sleep(0.01)
        return False
    return True


@cache
def kind_of_mount(place: str) -> str:
    """The type of the file system that a folder is on, such as nfs4, lustre or fuse.gcsfuse."""
    best, kind = "", "unknown"
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, found, *_ = line.split(" ")
            point = point.encode().decode("unicode_escape")
            if Path(place).resolve().is_relative_to(point) and len(point) >= len(best):
                best, kind = point, found
    return kind


def list_names(folder: Path) -> list[str]:
    """Names of all files below a folder, relative to it, in no particular order; none if the folder is missing.

    Raises:
        DataError: a folder in it cannot be read (which must not look like an empty folder).
    """
    with read_errors(str(folder)):
        walked = os.walk(folder, onerror=_fail)
        return [(Path(top) / name).relative_to(folder).as_posix() for top, _, names in walked for name in names]


def delete_tree(folder: Path) -> None:
    """Delete a folder with everything in it; it may be missing.

    Raises:
        ConfigError: it may not be deleted, is the root of the file system, is a link, or lies behind one that leads out of the run folder.
    """
    kept_within.check(folder)
    if folder.resolve() == folder.resolve().parent:  # callers check it as well; this is the last line that can stop it
        raise ConfigError(f"{folder}: refusing to delete a whole bucket or file system; name a folder in it.")
    if folder.is_symlink():
        raise ConfigError(
            f"{folder}: a link, to {os.path.realpath(folder)}; nothing is deleted through it. Delete the link, or what it leads to, yourself."
        )
    with write_errors(folder), suppress(FileNotFoundError):
        shutil.rmtree(folder)  # unlinks links in it, and follows none


def _beside(path: Path) -> Path:
    return path.parent / f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"


def _fail(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a folder that was deleted meanwhile counts as empty
        raise error


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new name in it survives a power cut. Some network file systems refuse; they order such changes themselves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
