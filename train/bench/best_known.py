"""The section "Best known anywhere" of docs/benchmarks.md: what others have published, with its source, beside what is recorded here."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

TABLE = "best_known.toml"
_HEAD = """## Best known anywhere

Figures of others are those that they published, on their machines, and were not run again unless the source says so: they say what is possible, and are no comparison. Ours are the ratios recorded below.

| what | best known | source | ours | open |
|---|---|---|---|---|"""


class Row(BaseModel):
    """One line of the table."""

    model_config = ConfigDict(extra="forbid")
    what: str
    best: str
    source: str
    ours: list[tuple[str, str]] = []
    """Recorded ratios, each by its benchmark and its name there."""
    said: str = ""
    """What is ours, where no ratio is recorded; it names the page that shows it."""
    open: str = ""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")
    row: list[Row]


def section(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """The section as Markdown, or "" if the folder has no such table.

    Args:
        folder: of docs/benchmarks.
        results: those of the benchmarks.

    Raises:
        ValueError: the table is damaged, or names a ratio that no result has.
    """
    place = folder / TABLE
    if not place.exists():
        return ""
    try:
        rows = _Table.model_validate(tomllib.loads(place.read_text())).row
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ValueError(f"{TABLE}: not a table of what is best known ({error})") from error
    return "\n".join([_HEAD, *(_line(row, results) for row in rows), ""])


def _line(row: Row, results: Sequence[Mapping[str, Any]]) -> str:
    ours = "; ".join([*(_value(benchmark, ratio, results) for benchmark, ratio in row.ours), *([row.said] if row.said else [])])
    return f"| {row.what} | {row.best} | {row.source} | {ours or 'none'} | {row.open} |"


def _value(benchmark: str, ratio: str, results: Sequence[Mapping[str, Any]]) -> str:
    found = [result for result in results if result["name"] == benchmark and ratio in result["ratios"]]
    if not found:
        raise ValueError(f"{TABLE}: no result of the benchmark '{benchmark}' has a ratio '{ratio}'; name one that docs/benchmarks.md shows.")
    values = " and ".join(f"{result['ratios'][ratio]['value']:.2f} ({result['device']['name']}, {result['date'][:10]})" for result in found)
    return f"{ratio}: {values}"
