"""Schema numbers of stored formats. What another version of this code wrote is either read correctly, or refused with what to do; it is never misread."""

from __future__ import annotations

from infra.errors import ConfigError

RUN = "run/2"
"""The schema of a run folder (markers, exit records, ledger, metrics), stored in provenance.json. Since 2, a node summarises its ranks' exit records."""
OLDER_RUN = "run/1"
"""Read as well, and no longer written: a folder that is gone on with gets the number above. A folder without a number is of this one."""
CHECKPOINT = "checkpoint/2"
"""Of a checkpoint's marker, its index and the index's parts. Since 2 each rank writes its own part of the index."""
OLDER_CHECKPOINT = "checkpoint/1"
"""Read as well, and no longer written."""
EXPORT = "export/1"
TOKENIZER = "tokenizer/1"


def require(found: object, known: str, url: str, remedy: str, *older: str) -> None:
    """Refuse an unknown schema. That is a ConfigError and not damage, so that no caller falls back to an older file or replaces this one.

    Args:
        found: what is stored.
        known: what this version reads.
        url: where it is stored.
        remedy: the command that makes it anew.
        older: older schemas that this version reads as well.

    Raises:
        ConfigError: the schema is not among the known ones.
    """
    if found not in (known, *older):
        raise ConfigError(
            f"{url}: schema {found!r}, and this version reads {known!r}: use the version that wrote it (its commit is stored there), or {remedy}."
        )
