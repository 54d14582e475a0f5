"""How a batch is divided among processes and micro-batches: one rule for a stage's start, for jobs at their submission, and for ``plan``. Needs no torch."""

from __future__ import annotations

from infra.errors import ConfigError


def rows(batch: int, accumulation: int, processes: int, section: str) -> int:
    """Number of samples in one micro-batch of one process.

    Args:
        section: where the configuration has the batch, for messages.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """
    shares = processes * accumulation
    if batch % shares:
        raise ConfigError(
            f"{section}.batch = {batch} does not divide over {processes} processes x {section}.accumulation = {accumulation}; use a multiple of {shares}."
        )
    return batch // shares
