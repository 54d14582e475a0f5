"""Keeps a run's writes and deletions inside of its folder: nothing is written or deleted through a link below it that leads out.

A run folder may itself be a link, as on machines with a scratch disk, and so may the folders above it. Below it, links that lead out are read through (of an
earlier stage, which another run has made), and no more: the run would overwrite what is not its own, or delete it as superseded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from infra.errors import ConfigError

_folders: set[str] = set()
_DEPTH = 3
"""Levels below a folder that are searched for links: the folders of checkpoints and attempts."""


def keep(folder: Path) -> None:
    """From here on, this process writes and deletes below a run folder only what really lies in it."""
    _folders.add(os.path.abspath(folder))


def check(path: Path) -> None:
    """Refuse to write or delete a file or folder that does not really lie in the run folder whose path it has.

    Raises:
        ConfigError: a link above it leads out of the run folder.
    """
    place = os.path.abspath(path)
    run = next((above for above in _above(place) if above in _folders), "")
    if run and not _is_within(folder := os.path.dirname(place), run):
        _refuse(folder, run)


def leads_out(path: Path) -> bool:
    """Whether a file or folder below a run folder lies elsewhere, because it is a link or lies behind one."""
    place = os.path.abspath(path)
    run = next((above for above in _above(place) if above in _folders), "")
    return bool(run) and not _is_within(place, run)


def refuse_links(run: Path, names: Sequence[str]) -> None:
    """Look for links that lead out before work begins that would come upon them hours later.

    Args:
        run: the run folder.
        names: the folders in it that will be written to.

    Raises:
        ConfigError: one of them is, or holds, such a link.
    """
    for found in _links(str(run), sorted(set(names)), _DEPTH):
        if not _is_within(found, str(run)):
            _refuse(found, str(run))


def _links(folder: str, names: Sequence[str], depth: int) -> Iterator[str]:
    for place in (os.path.join(folder, name) for name in names):
        if os.path.islink(place):
            yield place
        elif depth > 1 and os.path.isdir(place):
            with os.scandir(place) as entries:
                inside = sorted(entry.name for entry in entries if entry.is_symlink() or entry.is_dir(follow_symlinks=False))
            yield from _links(place, inside, depth - 1)


def _above(place: str) -> Iterator[str]:
    while (parent := os.path.dirname(place)) != place:
        yield parent
        place = parent


def _is_within(place: str, run: str) -> bool:
    """Links that end nowhere are resolved as far as they go, so that a folder which does not exist yet is within."""
    real, root = os.path.realpath(place), os.path.realpath(run)
    return real == root or real.startswith(f"{root.rstrip('/')}/")


def _refuse(place: str, run: str) -> None:
    link = place
    while not os.path.islink(link) and link != run:
        link = os.path.dirname(link)
    raise ConfigError(
        f"{link}: a link that leads out of the run folder, to {os.path.realpath(link)}; nothing is written or deleted through it. Put the files themselves "
        "there (cp -rL, or cp -al on one disk). The whole run folder may be a link, and places that runs share are named by data.images, data.codes and "
        "data.tokenizer."
    )
