"""Schema numbers of stored formats: what another version of this code wrote is read, or refused with what to do, and never misread."""

from __future__ import annotations

from infra.errors import ConfigError

RUN = "run/1"
"""Of a run folder: markers, exit records and the ledger, metrics. It stands in provenance.json; a folder without one is of schema 1."""
CHECKPOINT = "checkpoint/1"
EXPORT = "export/1"
TOKENIZER = "tokenizer/1"


def require(found: object, known: str, url: str, remedy: str) -> None:
    """Refuse another schema than the one that is known. A configuration error, not damage: nothing falls back to an older file, or replaces this one.

    Args:
        found: what is stored.
        known: what this version reads.
        url: where it is stored.
        remedy: what makes it anew, as a command.

    Raises:
        ConfigError: they differ.
    """
    if found != known:
        raise ConfigError(
            f"{url}: schema {found!r}, and this version reads {known!r}: use the version that wrote it (its commit is stored there), or {remedy}."
        )
