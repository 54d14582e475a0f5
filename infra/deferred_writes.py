"""Writes of an ending process that failed in a storage outage: noted on this node, and carried out by its launcher once the storage answers again.

Without them a rank that ends during an outage could neither record why it ended nor undo what it had begun, and would count as killed.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra import scratch, storage
from infra.errors import UnreachableError

PATIENCE_S = 120.0
"""Seconds that a launcher waits for the storage after its ranks have ended, on top of the retries of each request."""
_VARIABLE = "LAUNCHER_NOTES"
_PAUSE_S = 0.5  # between attempts; each request has retries of its own


def note(what: str, url: str, value: Any = None) -> bool:
    """Leave a write for the launcher of this node to carry out.

    Args:
        what: what the write says, in a few words, for messages.
        url: the file to write, or to delete if ``value`` is None.
        value: JSON to write.

    Returns:
        Whether there is a launcher that carries it out.
    """
    folder = os.environ.get(_VARIABLE)
    if folder:
        name = f"{time.time_ns():020d}-{secrets.token_hex(8)}.json"
        storage.write_json(storage.join(folder, name), {"what": what, "url": url, "value": value})
    return bool(folder)


@contextmanager
def taking_notes() -> Iterator[None]:
    """Collect the notes of this process and its children, and carry them out at the end of the block.

    Raises:
        UnreachableError: the storage does not answer within PATIENCE_S; the message names what is lost.
    """
    with scratch.folder("notes-") as folder:
        os.environ[_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[_VARIABLE]
            _carry_out(sorted(Path(folder).glob("*.json")), time.monotonic() + PATIENCE_S)


def _carry_out(notes: list[Path], deadline: float) -> None:
    waiting = [json.loads(path.read_text()) for path in notes]
    while waiting:
        try:
            _act(waiting[0])
            waiting.pop(0)
        except UnreachableError as error:
            if time.monotonic() > deadline:
                raise UnreachableError(f"storage unreachable: {error} Not recorded: {'; '.join(each['what'] for each in waiting)}") from error
            time.sleep(_PAUSE_S)


def _act(noted: dict[str, Any]) -> None:
    if noted["value"] is None:
        storage.delete(noted["url"])
    else:
        storage.write_json(noted["url"], noted["value"])
