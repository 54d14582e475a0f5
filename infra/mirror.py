"""A local copy of files on storage that grow at their ends: each look reads what is new, by ranges, and nothing twice."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from infra import storage
from infra.errors import DataError

log = logging.getLogger(__name__)

_OVERLAP = 64
"""Bytes before the new ones that are read again: where they differ, the file is another one by the same name."""
_PIECE = 8 << 20
"""Bytes of a read; so many are in memory at a time."""


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

    def look(self) -> Look:
        """Bring the copy up to date: one listing, and a read of each file that changed. A storage that does not answer, and a file that changes while it is
        read, are left to the next look."""
        found = Look()
        try:
            listed = {info.name: info for info in storage.glob(f"{self.url}/")[1] if self._wanted(info.name)}
            for name, info in sorted(listed.items()):
                if self._versions.get(name) != info.version:
                    found = self._follow(name, info.size, found)
                    self._versions[name] = info.version
        except DataError as error:
            log.warning("%s: not all of it could be read (%s); the next look does", self.url, error)
            return replace(found, failed=str(error))
        gone = sorted(name for name in storage.list_files(str(self.folder)) if name not in listed and self._wanted(name))
        for name in gone:
            self._place(name).unlink()
            self._versions.pop(name, None)
        return replace(found, files=len(listed), replaced=(*found.replaced, *gone))

    def _place(self, name: str) -> Path:
        if {"", ".", ".."} & set(name.split("/")):
            raise DataError(f"{self.url}: the object {name!r} leads out of it; rename or delete it.")
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


def _tail(place: Path, count: int) -> bytes:
    with place.open("rb") as file:
        file.seek(-count, os.SEEK_END)
        return file.read(count)
