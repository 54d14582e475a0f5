"""Failures alike: a storage or a network that breaks every file breaks the next one too, and none of them should be deleted for it."""

from __future__ import annotations

from dataclasses import dataclass

from infra.errors import DataError, MissingError

LIMIT = 16
"""Files in a row that failed alike, with none between them that was right, after which no more are looked at."""


@dataclass
class Alike:
    """Files of other storage that failed in a row for one reason."""

    reason: str = ""
    count: int = 0
    last: str = ""
    """URL of the last, and what was wrong with it."""
    sound: int = 0
    """Files that were right, of all."""

    def right(self) -> None:
        """A file came as it was written."""
        self.reason, self.count, self.sound = "", 0, self.sound + 1

    def wrong(self, reason: str, last: str, count: int = 1) -> None:
        """Files that failed.

        Raises:
            DataError: so many did, all alike.
        """
        self.count = self.count + count if reason == self.reason else count
        self.reason, self.last = reason, last
        if self.count >= LIMIT:
            raise DataError(
                f"{last}; so it was with {self.count} files in a row, and with none between them otherwise: that is the storage, or what lies between it and "
                "this machine, rather than the set. Nothing needs to be deleted; look at one of these files from another machine, then run this again."
            )

    def include(self, part: Alike) -> None:
        """What another process found in a part, after what was found so far.

        Raises:
            DataError: as of ``wrong``.
        """
        if part.sound:
            self.reason, self.count, self.sound = "", 0, self.sound + part.sound
        if part.count:
            self.wrong(part.reason, part.last, part.count)


def reason_of(error: DataError) -> str:
    """What failures that are alike have in common; empty for a missing file, which says nothing of the next."""
    return "" if isinstance(error, MissingError) else f"{type(error).__name__} {type(error.__cause__).__name__}"
