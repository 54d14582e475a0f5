"""A folder on this node that a launcher and its ranks share during an attempt, to save requests to the storage.

Ranks that end normally leave their exit records there, and the launcher writes one summary of them. Files of the run that do not change during the attempt
are fetched by the first rank that asks; the others wait for its copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from infra import environment, errors, scratch, storage, strict_json
from infra.errors import ReportedError

_VARIABLE = "LAUNCHER_NODE_FOLDER"
_EXIT = "exit-"


@contextmanager
def shared() -> Iterator[Path]:
    """Make such a folder for this process and its children."""
    with scratch.folder("node-") as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ[_VARIABLE]


def leave_exit(record: dict[str, Any]) -> bool:
    """Leave a rank's exit record for its launcher to summarise; returns whether there is such a launcher."""
    folder = environment.text(_VARIABLE)
    if not folder:
        return False
    try:
        storage.write_json(storage.join(folder, f"{_EXIT}{record['rank']}.json"), record)
    except ReportedError:  # no room on this node
        return False
    return True


def exits(folder: Path) -> list[dict[str, Any]]:
    """The records that were left, ordered by rank."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{_EXIT}*.json")]
    return sorted(found, key=lambda record: int(record["rank"]))


def read_once(url: str, most: int) -> bytes:
    """A file of at most ``most`` bytes; a remote one is fetched once for all ranks of this node. It must not change during the attempt.

    Raises:
        ReportedError: what the first rank to ask got; the others get the same error without asking the storage.
    """
    if not storage.is_remote(url):
        return storage.read_at_most(url, most)
    found = once(f"read-{url}", lambda: _fetched(url, most))
    if found[:1] == b"E":
        name, message = json.loads(found[1:])
        raise getattr(errors, name)(message)
    return found[1:]


def json_once(url: str, *, alike: bool = False, taken: strict_json.Taken | None = None) -> Any:
    """The same of a JSON file; ``alike`` and ``taken`` as in ``strict_json.loads``.

    Raises:
        DataError: it is missing, or no JSON.
    """
    return storage.parse_json(url, read_once(url, strict_json.MAX_BYTES), alike=alike, taken=taken)


def once(name: str, produce: Callable[[], bytes]) -> bytes:
    """The result of ``produce``, called by the first process of this node that asks; the others wait for it. Without a shared folder, each calls it."""
    folder = environment.text(_VARIABLE)
    if not folder:
        return produce()
    with Path(folder, f"once-{hashlib.sha256(name.encode()).hexdigest()}").open("a+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if file.read(1):
            return file.read()
        found = produce()
        _leave(file, found)
    return found


def _leave(file: FileIO, found: bytes) -> None:
    """Write it, after a mark that it is there, for the others, who produce it themselves where there is no room."""
    try:
        for part in (b"+", found):
            rest = memoryview(part)
            while rest:
                rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(0)


def _fetched(url: str, most: int) -> bytes:
    try:
        return b"D" + storage.read_at_most(url, most)
    except ReportedError as error:
        return b"E" + json.dumps([type(error).__name__, str(error)]).encode()
