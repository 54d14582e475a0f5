"""The images that rows name: by their sizes and times (or ETags) an image that was replaced under its name is noticed, without a look into it.

Rows of tables say where an image lies, and nothing about what it holds. So the name of a part of such rows depends on what a listing says of each image. It costs a read of
the rows, and of each image one stat() on a disk; on other storage the folders in which they lie are listed once a process, a request for a thousand files. Folders of
far more files than rows name are not: there each image is asked for by itself, so that a look never takes more than two requests an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from threading import Lock

import numpy as np

from infra import globs, storage
from infra.errors import DataError, MissingError, NoRoomError, UnreachableError

_PAGE = 1000  # files of which one request tells
_FEW_PAGES = 16
_FETCHES = 16  # images that are asked for at once
_HELD = 8_000_000  # files of listed folders that are remembered, at 24 bytes each
_MISSING, _BAD = "missing", "cannot be looked at"


@dataclass(frozen=True)
class Look:
    """What is known of the images of some rows without reading them."""

    digest: str
    """Of their sizes and times, in order."""
    count: int
    bytes: int


class Looks:
    """Looks at images, and the listings that they share."""

    def __init__(self) -> None:
        self._folders: dict[str, _Folder | None] = {}
        self._lock = Lock()

    def at(self, urls: Iterator[str]) -> Look:
        """A look at some images. Rows that cannot be read end it, which their reader will say.

        Raises:
            UnreachableError: the storage gives no answer.
        """
        found, count, size = hashlib.sha256(), 0, 0
        for each, version in self._facts(urls):
            found.update(f"{version}\n".encode())
            count, size = count + 1, size + each
        return Look(found.hexdigest(), count, size)

    def _facts(self, urls: Iterator[str]) -> Iterator[tuple[int, str]]:
        """(size, what changes with the content) of each."""
        remote: list[str] = []
        try:
            for url in urls:
                if storage.is_remote(url):
                    remote.append(url)
                else:
                    yield _asked(url)
        except (UnreachableError, NoRoomError):
            raise
        except Exception:  # whatever breaks a reader is counted as a try where it reads
            yield 0, _BAD
        yield from self._listed(remote)

    def _listed(self, urls: list[str]) -> Iterator[tuple[int, str]]:
        with self._lock:
            counts: dict[str, int] = {}
            for url in urls:
                counts[_folder(url)] = counts.get(_folder(url), 0) + 1
            for folder, count in counts.items():
                if folder not in self._folders:
                    self._remember(folder, count)
            known = {folder: self._folders.get(folder) for folder in counts}

        def fact(url: str) -> tuple[int, str]:
            listed = known[_folder(url)]
            return (listed.find(url) if listed else None) or _asked(url)

        with ThreadPoolExecutor(_FETCHES) as pool:
            yield from pool.map(fact, urls)

    def _remember(self, folder: str, count: int) -> None:
        most = _PAGE * max(_FEW_PAGES, count)
        listed = _Folder(islice(storage.glob(storage.join(globs.escape(folder), "*"))[1], most + 1))
        held = sum(map(len, filter(None, self._folders.values())))
        for name in list(self._folders):
            if held + len(listed) <= _HELD:
                break
            held -= len(self._folders.pop(name) or ())
        self._folders[folder] = listed if len(listed) <= most else None


class _Folder:
    """Names, sizes and versions of the files of a folder, hashed: 24 bytes a file."""

    def __init__(self, files: Iterable[globs.FileInfo]) -> None:
        facts = ((_hash(file.name), _hash(file.version), file.size) for file in files)
        rows = np.sort(np.fromiter(facts, dtype=[("name", "u8"), ("version", "u8"), ("size", "i8")]), order="name")
        self._names, self._versions, self._sizes = (np.ascontiguousarray(rows[column]) for column in ("name", "version", "size"))

    def __len__(self) -> int:
        return len(self._names)

    def find(self, url: str) -> tuple[int, str] | None:
        name = _hash(url.rpartition("/")[2])
        at = int(np.searchsorted(self._names, name))
        if at == len(self._names) or self._names[at] != name:
            return None
        return int(self._sizes[at]), f"{self._versions[at]:016x}"


def _hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little"))


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _asked(url: str) -> tuple[int, str]:
    """Of one image by itself."""
    try:
        found = storage.stat(url)
    except UnreachableError:
        raise
    except MissingError:
        return 0, _MISSING
    except DataError:
        return 0, _BAD
    return found.size, f"{int(_hash(found.version)):016x}"
