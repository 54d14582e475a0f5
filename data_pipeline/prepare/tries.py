"""Tries at reading input shards, recorded beside the sets: a shard that fails repeatedly, or kills its reader, is quarantined, and the others go on."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from typing import Any

from data_pipeline.shards import links
from data_pipeline.shards.shard_set import part_name
from infra import deferred_writes, shown, storage, stored
from infra.errors import UnreachableError

_FOLDER = "tries"


class Try(stored.Stored):
    """A record of a try."""

    reason: str


@dataclass(frozen=True)
class Tries:
    """The tries at one unit of work."""

    images_url: str
    inputs: str
    """Digest of the unit's inputs."""

    @property
    def url(self) -> str:
        """Folder of the records; if it is deleted the unit is tried afresh."""
        return storage.join(self.images_url, _FOLDER, part_name(self.inputs))

    def failed(self) -> list[dict[str, Any]]:
        """Records of the tries that failed, in order."""
        return [stored.read(storage.join(self.url, name), Try) for name in storage.list_files(self.url)]

    def spent(self, failed: list[dict[str, Any]], max_tries: int) -> bool:
        """Whether no try is left: there were ``max_tries``, or the last one failed for a reason that another try cannot change."""
        return len(failed) >= max_tries or bool(failed and failed[-1].get("unchanging"))

    def begin(self, number: int) -> str:
        """Record that a try begins. If the reader is killed, the record stays as it is and counts as a failure.

        Returns:
            URL of the record.
        """
        place = storage.join(self.url, f"{number:03d}.json")
        links.check(place)
        storage.write_json(place, {"reason": "the process that read it was killed", "host": platform.node(), "pid": os.getpid(), "time": time.time()})
        return place

    def clear(self) -> None:
        """Delete the records of all tries, because the unit is done."""
        storage.delete_prefix(self.url)


def record_failure(place: str, reason: str, *, unchanging: bool = False) -> None:
    """Record why the try that ``begin`` recorded failed, and whether another try would fail for the same reason."""
    storage.write_json(place, stored.read(place, Try) | {"reason": shown.message(reason)} | ({"unchanging": True} if unchanging else {}))


def withdraw(place: str) -> None:
    """Delete the record of a try that was stopped from outside. In an outage the launcher does it later (``infra/deferred_writes.py``).

    Raises:
        UnreachableError: the storage does not answer, and there is no launcher that could do it later.
    """
    try:
        storage.delete(place)
    except UnreachableError:
        if not deferred_writes.note(f"{place} counts a try that was none of the shard's", place):
            raise
