"""What all benchmarks share: the result, its JSON schema and its file. Needs only torch and the standard library.

So a benchmark of a model runs on a machine that has nothing but torch: ``python -m train.bench.<name>`` from the root of the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from infra.repository import commit
from train.machine.rates import Figure, Options, describe_device

SCHEMA = "bench/1"
UNFINISHED = ".unfinished.json"
"""How the file ends that holds the figures so far of a benchmark which is still at work, or was cut."""


@dataclass(frozen=True)
class Ratio:
    """One figure divided by another of the same run."""

    value: float
    of: str
    """Name of the numerator, in measured."""
    to: str
    """Name of the denominator, in floor, measured or peers."""
    goal: float | None = None
    """The ratio should be at least this."""


@dataclass
class Result:
    """One benchmark on one device."""

    name: str
    title: str
    device: dict[str, Any]
    versions: dict[str, str]
    commit: str
    date: str
    schema: str = SCHEMA
    settings: dict[str, Any] = field(default_factory=dict)
    """What was measured: sizes, dtypes, threads."""
    floor: dict[str, Figure] = field(default_factory=dict)
    """What the machine can do at best, measured in the same run."""
    measured: dict[str, Figure] = field(default_factory=dict)
    ratios: dict[str, Ratio] = field(default_factory=dict)
    peers: dict[str, Figure] = field(default_factory=dict)
    """Other implementations, measured in the same run."""
    notes: list[str] = field(default_factory=list)

    def ratio(self, name: str, of: str, to: str, goal: float | None = None) -> None:
        """Add the ratio of two figures' medians.

        Raises:
            ValueError: there is no such figure.
        """
        figures = self.floor | self.measured | self.peers
        for word in (of, to):
            if word not in figures:
                raise ValueError(f"ratio '{name}': no figure '{word}'; there are {', '.join(sorted(figures)) or 'none'}")
        self.ratios[name] = Ratio(figures[of].value / figures[to].value, of, to, goal)


class _Kept(dict[str, Figure]):
    """Figures by name; each that is added is told and written at once, so that a benchmark that is cut leaves those that it has."""

    def __init__(self, *given: Any, keep: Callable[[str, Figure], None] | None = None) -> None:
        super().__init__(*given)
        self._keep = keep

    def __setitem__(self, name: str, figure: Figure) -> None:
        super().__setitem__(name, figure)
        if self._keep is not None:
            self._keep(name, figure)

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]  # otherwise dict adds without telling
        for name, figure in dict(other).items():
            self[name] = figure
        return self


def start(name: str, title: str, options: Options, **settings: Any) -> Result:
    """A result that has everything but figures. With a folder in the options, each figure is kept there as it is added."""
    result = Result(
        name=name,
        title=title,
        device=describe_device(options.device),
        versions={"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)},
        commit=commit(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        # Recorded because other load on the machine explains a wide range of the figures.
        settings=settings | {"load_at_start": round(os.getloadavg()[0], 1)},
    )
    if options.folder is not None:
        keep = partial(_keep, result, options.folder)
        result.floor, result.measured, result.peers = (_Kept(keep=keep) for _ in range(3))
    return result


def _keep(result: Result, folder: Path, name: str, figure: Figure) -> None:
    print(f"{name}: {figure.value:.5g} {figure.unit} ({figure.min:.5g} to {figure.max:.5g})", file=sys.stderr, flush=True)
    write(replace(result, notes=[*result.notes, "Unfinished: the figures so far."]), folder, UNFINISHED)


# --- Files --------------------------------------------------------------------------------------------------------------------------------

_NUMBER = {"type": "number"}
_FIGURE = {
    "type": "object",
    "properties": {"value": _NUMBER, "min": _NUMBER, "max": _NUMBER, "unit": {"type": "string"}, "runs": {"type": "integer"}},
    "required": ["value", "min", "max", "unit", "runs"],
    "additionalProperties": False,
}
_RATIO = {
    "type": "object",
    "properties": {"value": _NUMBER, "of": {"type": "string"}, "to": {"type": "string"}, "goal": {"type": ["number", "null"]}},
    "required": ["value", "of", "to", "goal"],
    "additionalProperties": False,
}
_FIGURES = {"type": "object", "additionalProperties": _FIGURE}
JSON_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Result of a benchmark",
    "type": "object",
    "properties": {
        "schema": {"const": SCHEMA},
        "name": {"type": "string"},
        "title": {"type": "string"},
        "device": {"type": "object", "properties": {"kind": {"type": "string"}, "name": {"type": "string"}}, "required": ["kind", "name"]},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
        "commit": {"type": "string"},
        "date": {"type": "string"},
        "settings": {"type": "object"},
        "floor": _FIGURES,
        "measured": _FIGURES,
        "ratios": {"type": "object", "additionalProperties": _RATIO},
        "peers": _FIGURES,
        "notes": {"type": "array", "items": {"type": "string"}},
    },
    "additionalProperties": False,
}
JSON_SCHEMA["required"] = sorted(JSON_SCHEMA["properties"])


def to_json(result: Result) -> str:
    """A result as sorted JSON, with figures of five significant digits. NaN and infinity raise a ValueError."""
    return json.dumps(_rounded(asdict(result)), indent=2, sort_keys=True, allow_nan=False) + "\n"


def write(result: Result, folder: Path, ending: str = ".json") -> Path:
    """Write a result as ``<name>-<device>.json``, replacing an earlier one. Never half of it: the process may be killed."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{result.name} {result.device['name']} {result.device.get('cores', '')}".lower()).strip("-")
    path, new = folder / f"{slug}{ending}", folder / f"{slug}.new"
    folder.mkdir(parents=True, exist_ok=True)
    new.write_text(to_json(result))
    new.replace(path)
    if ending != UNFINISHED:
        (folder / f"{slug}{UNFINISHED}").unlink(missing_ok=True)
    return path


def main(run: Callable[[Options], Result]) -> None:
    """The command line of a benchmark module: runs it, prints the result, and writes it if a folder is given, with the figures so far while it is at work."""
    parser = argparse.ArgumentParser(description="Run a benchmark and print its result as JSON.")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=Options.device)
    parser.add_argument("--seconds", type=float, default=Options.seconds, help="time for each figure")
    parser.add_argument("--runs", type=int, default=Options.runs, help="runs that share this time")
    given = parser.parse_args()
    result = run(Options(given.device, given.seconds, given.runs, given.out))
    print(to_json(result), end="")
    if given.out:
        print(write(result, given.out))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
