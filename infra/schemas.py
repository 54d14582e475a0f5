"""Schema numbers of stored formats: what another version of this code wrote is read, or refused with what to do, and never misread."""

from __future__ import annotations

from infra.errors import ConfigError

RUN = "run/2"
"""Of a run folder: markers, exit records and the ledger, metrics. It stands in provenance.json. Since 2 a node sums its ranks' exit records up."""
OLDER_RUN = "run/1"
"""Read as well, and no longer written: a folder that is gone on with gets the number above. A folder without a number is of this one."""
CHECKPOINT = "checkpoint/2"
"""Of a checkpoint's marker, its index and the index's parts. Since 2 each rank writes its own part of the index."""
OLDER_CHECKPOINT = "checkpoint/1"
"""Read as well, and no longer written."""
EXPORT = "export/1"
TOKENIZER = "tokenizer/1"


def require(found: object, known: str, url: str, remedy: str, *older: str) -> None:
    """Refuse another schema than the one that is known. A configuration error, not damage: nothing falls back to an older file, or replaces this one.

    Args:
        found: what is stored.
        known: what this version reads.
        url: where it is stored.
        remedy: what makes it anew, as a command.
        older: schemas that are read as well.

    Raises:
        ConfigError: they differ.
    """
    if found not in (known, *older):
        raise ConfigError(
            f"{url}: schema {found!r}, and this version reads {known!r}: use the version that wrote it (its commit is stored there), or {remedy}."
        )
