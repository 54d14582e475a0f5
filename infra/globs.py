"""Matching of names against patterns, for local folders and object stores alike: ``*``, ``?`` and ``[...]`` stay within one folder, ``**`` stands for folders
of any depth.

Listings are ordered by full name, as S3 orders them, so that a folder copied to S3 gives the same list.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from infra.files import read_errors

_SPECIAL = "*?["
LINK_OUTSIDE = "link outside"
"""``FileInfo.version`` of a link to a folder that is not followed because it leads outside the allowed folders."""
CLOSED_FOLDER = "closed folder"
"""``FileInfo.version`` of a folder that can never be listed: without permission, or with a path that is too long."""
LISTED_FOLDER = "listed folder"
"""``FileInfo.version`` of a link to a folder whose files are listed under another name."""
NOT_FILES = (LINK_OUTSIDE, CLOSED_FOLDER, LISTED_FOLDER)
_NEVER = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)


@dataclass(frozen=True)
class FileInfo:
    """One file or object of a listing."""

    name: str
    """Relative to the folder that was listed; the name of a folder ends with a slash."""
    size: int
    """In bytes."""
    version: str
    """A string that changes whenever the content may have changed."""


Level = Callable[[str, str], Iterator[FileInfo]]
"""(folder, start) -> files and folders directly in it whose names begin with ``start``."""
Walk = Callable[[str], Iterator[FileInfo]]
"""folder -> all files below it."""


def is_pattern(url: str) -> bool:
    """Whether a URL holds a special character."""
    return any(character in url for character in _SPECIAL)


def escape(url: str) -> str:
    """A pattern that matches exactly this URL."""
    return "".join(f"[{character}]" if character in _SPECIAL else character for character in url)


def split(url: str) -> tuple[str, list[str]]:
    """The folder above the first part that holds a special character, and the parts from there on."""
    parts = url.split("/")
    first = next(number for number, part in enumerate(parts) if is_pattern(part))
    base = "/".join(parts[:first])
    return (base or "/" if url.startswith("/") else base), [part for part in parts[first:] if part]


def literal(base: str, parts: list[str], is_folder: Callable[[str], bool]) -> tuple[str, list[str]]:
    """Folders of a pattern that exist under the names that it gives them belong to what is fixed: of ``photos [2020]/*.jpg`` the last part is the pattern."""
    while len(parts) > 1 and parts[0] != "**" and is_folder(place := f"{base.rstrip('/')}/{parts[0]}" if base else parts[0]):
        base, parts = place, parts[1:]
    return base, parts


def fixed_start(part: str) -> str:
    """The characters of a pattern before its first special one."""
    return part[: min((part.index(character) for character in _SPECIAL if character in part), default=len(part))]


def is_hidden(name: str) -> bool:
    """Whether any part of a path begins with a dot: listings leave such names out."""
    return name.startswith(".") or "/." in name


def matches(name: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a path match the parts of a pattern."""
    if not pattern:
        return not name
    if pattern[0] != "**":
        return bool(name) and fnmatchcase(name[0], pattern[0]) and matches(name[1:], pattern[1:])
    if len(pattern) == 1:
        return bool(name)
    return any(matches(name[skipped:], pattern[1:]) for skipped in range(len(name)))


def expand(place: str, parts: list[str], level: Level, walk: Walk) -> Iterator[FileInfo]:
    """The files below ``place`` that match ``parts``; folders that cannot match are not listed."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from (found for found in walk(place) if found.version in NOT_FILES or matches(found.name.split("/"), parts))
        return
    for found in level(place, fixed_start(part)):
        name = found.name.rstrip("/")
        if is_hidden(name) or not fnmatchcase(name, part):
            continue
        is_folder = found.name.endswith("/")
        if rest and is_folder:
            inside = expand(f"{place.rstrip('/')}/{name}", rest, level, walk)
            yield from (replace(deeper, name=f"{name}/{deeper.name}") for deeper in inside)
        elif (not rest and not is_folder) or found.version in NOT_FILES:
            yield found


def local_info(name: str, found: os.stat_result) -> FileInfo:
    """A local file, from what stat() says about it."""
    return FileInfo(name, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


def remote_info(name: str, size: int, etag: str) -> FileInfo:
    """An object, from what a listing or a HEAD request says about it."""
    return FileInfo(name, size, f"{size}-{etag}")


def local_level(folder: Path, start: str = "", roots: tuple[str, ...] = ()) -> Iterator[FileInfo]:
    """Files and folders directly in a local folder, ordered by full name; none if the folder is missing. A broken link is listed, too.

    Args:
        folder: what to list.
        start: how the names begin.
        roots: real paths of the folders that links may lead to. A folder that must not be entered, or can never be, is then listed as a file, with one of
            NOT_FILES as its version. Empty: links may lead anywhere.
    """
    if not folder.is_dir():
        return
    with read_errors(str(folder)), os.scandir(folder) as entries:
        named = sorted((f"{entry.name}/" if _is_folder(entry) else entry.name, entry) for entry in entries if entry.name.startswith(start))
    for name, entry in named:
        if name.endswith("/"):
            odd = _why_closed(entry, roots) if roots else ""
            yield FileInfo(entry.name, 0, odd) if odd else FileInfo(name, -1, "")
            continue
        try:
            yield local_info(name, entry.stat())
        except OSError:
            yield FileInfo(name, 0, "broken link")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        if error.errno not in _NEVER:
            raise
        return False


def _why_closed(entry: os.DirEntry[str], roots: tuple[str, ...]) -> str:
    """Why a folder is not entered; empty: it may be."""
    if entry.is_symlink() and not is_below(os.path.realpath(entry.path), roots):
        return LINK_OUTSIDE
    try:
        os.scandir(entry.path).close()
    except OSError as error:
        if error.errno in _NEVER:
            return CLOSED_FOLDER
    return ""


def local_walk(folder: Path, roots: tuple[str, ...] = ()) -> Iterator[FileInfo]:
    """All files below a local folder, with the names of one folder of each depth in memory. Links to folders are followed, but each folder is walked once: a link
    to one that is walked anyway, or was met before, is listed as a file whose version is LISTED_FOLDER, if there are ``roots``.

    Args:
        folder: where to begin.
        roots: as of ``local_level``.
    """
    top = os.path.realpath(folder)
    linked = set[str]()  # real paths of the folders that were met by links
    opened = [("", top, False, local_level(folder, roots=roots))]
    while opened:
        above, real, by_link, level = opened[-1]
        found = next(level, None)
        if found is None:
            opened.pop()
            continue
        if is_hidden(found.name):
            continue
        name = above + found.name
        if not found.name.endswith("/"):
            yield replace(found, name=name)
            continue
        place = folder / name
        is_link = os.path.islink(place)
        target = os.path.realpath(place) if is_link else os.path.join(real, found.name.rstrip("/"))
        if is_link or by_link:
            if target in linked or _is_walked(target, top):
                if roots:
                    yield FileInfo(name.rstrip("/"), 0, LISTED_FOLDER)
                continue
            linked.add(target)
        opened.append((name, target, is_link or by_link, local_level(place, roots=roots)))


def _is_walked(path: str, top: str) -> bool:
    """Whether the walk of a folder comes to this real path without a link."""
    return path == top or (is_below(path, (top,)) and not is_hidden(path[len(top.rstrip("/")) + 1 :]))


def is_below(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a path is one of some folders, or lies below one."""
    return any(path == root or path.startswith(f"{root.rstrip('/')}/") for root in roots)
