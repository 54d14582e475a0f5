"""Keys of how a training stage is watched: part of each of its sections. No torch."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from infra.config import Section
from infra.config_keys import ANY_TIME


class WatchingSection(Section):
    """What of a training stage is shown and written down while it goes on; nothing of what it computes."""

    log_every: int = Field(default=10, gt=0, json_schema_extra=ANY_TIME)
    """Updates between logged points."""
    lines_every: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Updates between lines in a log; 0: a line every ten seconds. A terminal has a bar."""
    profile: tuple[PositiveInt, ...] = Field(default=(), json_schema_extra=ANY_TIME)
    """Updates that are profiled: a trace of torch's profiler, on a GPU a snapshot of its memory, and a page with the phases of all ranks, in <stage>/profile/
    (docs/watching.md says what that costs). Empty: none."""
    profile_ranks: tuple[NonNegativeInt, ...] = Field(default=(), json_schema_extra=ANY_TIME)
    """Ranks that write traces and snapshots of these updates; empty: all."""
