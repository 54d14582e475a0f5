"""A local copy of files on storage that grow at their ends: each look reads what is new, by ranges, and nothing twice."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from infra import files, shown, storage
from infra.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_OVERLAP = 64
"""Bytes before the new ones that are read again: where they differ, the file is another one by the same name."""
_PIECE = 8 << 20
"""Bytes of a read; so many are in memory at a time."""
_LONGEST = 1 << 16
_LONGEST_PART, _LONGEST_NAME = 255, 2000
"""Bytes of a file's name, and of its path below the copy."""
_OWNER = ".copied-from"
"""File of a copy that says of what: whatever else lies in the folder is deleted when it is not there, so the folder must be the copy's alone."""


@dataclass(frozen=True)
class Look:
    """What a look at the storage found."""

    files: int = 0
    """Files that are there."""
    grown: int = 0
    """Files of which something was new."""
    read: int = 0
    """Bytes read."""
    replaced: tuple[str, ...] = ()
    """Files that did not grow but were replaced or deleted, so that whoever reads the copy has to begin again with them."""
    failed: str = ""
    """Why this look is not complete; the next one makes up for it."""


class Mirror:
    """One folder and its copy. Names are kept.

    Args:
        url: the folder, local or remote; it may be missing, as one of a run that has not begun.
        folder: of the copy. What is there from an earlier time is continued.
        wanted: by name, which files are copied.
    """

    def __init__(self, url: str, folder: Path, wanted: Callable[[str], bool]) -> None:
        self.url, self.folder, self._wanted = url, folder, wanted
        self._versions: dict[str, str] = {}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside the block, the folder is this copy's, of this process: a look deletes from it what the original does not have.

        Raises:
            ConfigError: it holds something else, a copy of something else, or another process copies into it.
        """
        of, place = storage.absolute(self.url), self.folder / _OWNER
        if not storage.is_remote(of) and Path(os.path.abspath(self.folder)).is_relative_to(of):
            raise ConfigError(f"{self.folder}: lies in what is copied, {of}, and would be copied itself; name another folder.")
        with ExitStack() as held:
            with files.write_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not place.exists() and any(self.folder.iterdir()):
                    raise ConfigError(
                        f"{self.folder}: holds files that were not copied there by this command, which would delete them; name another folder."
                    )
                owner = held.enter_context(place.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.folder}: another process copies into it; name another folder, or end that one.") from None
            except OSError:
                log.info("%s: its file system knows no locks", self.folder)
            owner.seek(0)
            before = owner.read(_LONGEST)
            if before not in ("", of):
                raise ConfigError(f"{self.folder}: a copy of {before}, and not of {of}; name another folder, or delete that one.")
            if not before:
                with files.write_errors(self.folder):
                    owner.write(of)
                    owner.flush()
            yield

    def look(self) -> Look:
        """Bring the copy up to date: one listing, and a read of each file that changed. A storage that does not answer, and a file that changes while it is
        read, are left to the next look."""
        found = Look()
        try:
            infos = [info for info in storage.glob(f"{self.url}/")[1] if self._wanted(info.name) and not self._leads_out(info.name)]
            names = {info.name for info in infos}
            odd = sorted(name for name in names if _is_odd(name, names))
            listed = {info.name: info for info in infos if info.name not in odd}
            for name, info in sorted(listed.items()):
                if self._versions.get(name) != info.version:
                    with files.write_errors(self.folder):
                        found = self._follow(name, info.size, found)
                    self._versions[name] = info.version
        except DataError as error:
            log.warning("%s: not all of it could be read (%s); the next look does", self.url, error)
            return replace(found, failed=str(error))
        gone = sorted(name for name in storage.list_files(str(self.folder)) if name not in (*listed, _OWNER) and self._wanted(name))
        for name in gone:
            self._place(name).unlink(missing_ok=True)
            self._versions.pop(name, None)
        if odd:
            found = replace(
                found,
                failed=f"{self.url}: {len(odd)} objects have names that no file here can have, as {shown.value(odd[0])}; rename or delete them.",
            )
            log.warning("%s", found.failed)
        return replace(found, files=len(listed), replaced=(*found.replaced, *gone))

    def _leads_out(self, name: str) -> bool:
        """Whether a file is a link to one elsewhere, as in a run folder of somebody else, who may not read what its reader may."""
        if storage.is_remote(self.url):
            return False
        here = os.path.realpath(storage.local_path(self.url))
        return not Path(os.path.realpath(os.path.join(here, name))).is_relative_to(here)

    def _place(self, name: str) -> Path:
        return self.folder / name

    def _follow(self, name: str, size: int, found: Look) -> Look:
        """Append what is new of a file, or copy it anew if it is another one."""
        place = self._place(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        have = place.stat().st_size if place.exists() else 0
        overlap = min(_OVERLAP, have)
        data = b""
        if have and size >= have:
            data = storage.read_range(storage.join(self.url, name), have - overlap, min(size - have + overlap, _PIECE))
        same = have == 0 or (size >= have and data[:overlap] == _tail(place, overlap))
        if not same:
            log.info("%s: was replaced; it is copied anew", storage.join(self.url, name))
            have, overlap, data = 0, 0, b""
        target = place if same else place.with_name(f"{storage.TEMPORARY}{place.name}")
        read = len(data)
        with target.open("ab" if same else "wb") as file:
            file.write(data[overlap:])
            at = have + max(0, len(data) - overlap)
            while at < size:
                more = storage.read_range(storage.join(self.url, name), at, min(size - at, _PIECE))
                file.write(more)
                at, read = at + len(more), read + len(more)
        if not same:
            os.replace(target, place)
        changed = not same or at > have
        return replace(found, grown=found.grown + changed, read=found.read + read, replaced=found.replaced if same else (*found.replaced, name))


def _is_odd(name: str, names: Collection[str]) -> bool:
    """Whether an object cannot be a file of the copy: its name leads out of it, is none of a file, or another object is a file where it needs a folder."""
    parts = name.split("/")
    above = ("/".join(parts[:count]) for count in range(1, len(parts)))
    if {"", ".", "..", _OWNER} & set(parts) or "\0" in name or any(each in names for each in above):
        return True
    try:
        longest = max(len(os.fsencode(f"{storage.TEMPORARY}{part}")) for part in parts)
        return longest > _LONGEST_PART or len(os.fsencode(name)) > _LONGEST_NAME
    except UnicodeEncodeError:
        return True


def _tail(place: Path, count: int) -> bytes:
    with place.open("rb") as file:
        file.seek(-count, os.SEEK_END)
        return file.read(count)
