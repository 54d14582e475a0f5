"""Comparison: the keys of the configuration in which runs differ."""

from __future__ import annotations

from collections.abc import Mapping

from infra import shown
from infra.config import flatten
from infra.config_keys import completed
from train.config import RunConfig
from train.report.markup import Child, el, join, note, table
from train.report.view import RunView, Section


def section(runs: Mapping[str, RunView]) -> Section | None:
    """A row for each such key. What a run's configuration lacks counts with the value that stands for the behaviour before the key existed."""
    values = {name: flatten(completed(RunConfig, run.config)) if run.config else {} for name, run in runs.items()}
    keys = sorted({key for found in values.values() for key in found})
    different = [key for key in keys if len({repr(found.get(key)) for found in values.values()}) > 1]
    rows: list[list[Child]] = [[el("code", key), *(shown.value(found.get(key, "(absent)")) for found in values.values())] for key in different]
    if not rows:
        return Section("configuration", "Configuration", note("The runs have the same configuration."))
    words = f"{len(different)} of {len(keys)} keys differ."
    return Section("configuration", "Configuration", join(note(words), table(["key", *runs], rows, class_="changed")))
