"""The report's view of a run folder: files are read lazily, and none of them is required."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infra import storage
from infra.errors import DataError
from infra.run_folder import RunFolder
from train.config import load_run
from train.loop.metrics import Point, read_metrics
from train.report.markup import Html
from train.run import change_points, lineage
from train.run.stage_table import STAGES, TRAINED, Stage, used

_LARGEST_PICTURE = 256 << 20
"""Bytes of a picture's file; those of ours have some megabytes."""


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    key: str
    """Anchor of the section in the page (#key), and prefix of its identifiers."""
    title: str
    body: Html


class RunView:
    """Reads a run folder lazily: each part is read when a section first asks for it. A missing part is None or empty; a damaged one raises DataError."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._json: dict[str, dict[str, Any]] = {}
        self._series: dict[str, dict[str, list[Point]]] = {}

    @property
    def name(self) -> str:
        """Name of the run, which is that of its folder."""
        return storage.absolute(self.url).rstrip("/").rsplit("/", 1)[-1]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        return self.json("config.json")

    @property
    def provenance(self) -> dict[str, Any]:
        """Commit, versions and command that made the run."""
        return self.json("provenance.json")

    @property
    def generated(self) -> dict[str, Any]:
        """What the generate stage drew."""
        return self.json("generate", "index.json")

    @property
    def evaluation(self) -> dict[str, Any]:
        """What the evaluate stage measured."""
        return self.json("evaluate", "metrics.json")

    def section(self, name: str) -> dict[str, Any]:
        """One section of the configuration, or an empty one."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def done(self, stage: str) -> dict[str, Any]:
        """The marker of a finished stage (done.json); empty for an unfinished one."""
        return self.json(stage, "done.json")

    def summary(self, stage: str) -> dict[str, Any]:
        """The summary of a finished stage."""
        found = self.done(stage).get("summary")
        return found if isinstance(found, dict) else {}

    def json(self, *parts: str) -> dict[str, Any]:
        """A JSON object in the run folder; empty if the file is missing.

        Raises:
            DataError: the file is not a JSON object.
        """
        name = "/".join(parts)
        if name not in self._json:
            found = storage.read_json(storage.join(self.url, name)) if self.has(name) else {}
            if not isinstance(found, dict):
                raise DataError(
                    f"{storage.join(self.url, name)}: expected a JSON object, found {type(found).__name__}; delete it and run its stage again."
                )
            self._json[name] = found
        return self._json[name]

    def series(self, stage: str) -> dict[str, list[Point]]:
        """All metrics of a stage, with its attempts merged; empty before the first point."""
        if stage not in self._series:
            self._series[stage] = read_metrics(self.url, stage)
        return self._series[stage]

    def changes(self, stage: str) -> list[dict[str, Any]]:
        """The change points of a training stage, oldest first."""
        return change_points.read(storage.join(self.url, stage))

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """The stages that the run has, by its configuration or by what they left."""
        return used(lambda name: int(self.section(f"{name}_fit").get("steps") or bool(self.done(name))))

    @cached_property
    def out_of_date(self) -> dict[str, str]:
        """Stage -> by which older weights it was made, for stages that are out of date; empty for an incomplete run folder."""
        if not self.config or not self.provenance:
            return {}
        cfg, run = load_run(self.url, []), RunFolder(self.url)
        return {stage: old for stage in self.stages if (old := lineage.out_of_date(cfg, run, stage))}

    def measured(self, key: str, stage: str, metric: str) -> tuple[float, bool] | None:
        """A figure of evaluate/metrics.json, or where there is none the newest of a stage's metric; and whether it is of the first kind. None: neither is finite."""
        evaluated = self.evaluation.get(key)
        if stage == "dalle" and self.series("align").get(metric):
            stage = "align"
        value = self.last(stage, metric) if evaluated is None else float(evaluated)
        return None if value is None or not math.isfinite(value) else (value, evaluated is not None)

    def last(self, stage: str, name: str) -> float | None:
        """The newest value of a metric; None if there is none."""
        points = self.series(stage).get(name)
        return points[-1].value if points else None

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """What was drawn while the transformer trained, oldest first; a checkpoint that was drawn with several choices of captions counts with each."""
        entries = [self.json(name) for name in sorted(self._files) if name.startswith("dalle/samples/") and name.endswith("/entry.json")]
        return sorted(entries, key=lambda entry: int(entry["step"]))

    def picture(self, name: str | None) -> bytes | None:
        """Bytes of a picture in the run folder; None if it is missing. A link is no picture of ours: what it leads to would stand in a page that is passed on."""
        if not name or not self.has(name):
            return None
        url = storage.join(self.url, name)
        return None if not storage.is_remote(url) and storage.local_path(url).is_symlink() else storage.read_at_most(url, _LARGEST_PICTURE)

    def has(self, name: str) -> bool:
        """Whether the run folder holds a file."""
        return name in self._files

    @cached_property
    def _files(self) -> frozenset[str]:
        # Listed once instead of asking for every picture, which would be thousands of requests on S3. Shard sets are not listed.
        names = {name for name in ("config.json", "provenance.json") if storage.exists(storage.join(self.url, name))}
        for stage in STAGES:
            names |= {f"{stage}/{name}" for name in _own_files(self.url, stage)}
        return frozenset(names)


def _own_files(url: str, stage: str) -> list[str]:
    if stage in TRAINED:
        # Checkpoints may consist of many files, so only the parts that the report shows are listed.
        marks = [name for name in ("done.json", "codebook.json") if storage.exists(storage.join(url, stage, name))]
        shown = [f"{folder}/{name}" for folder in ("pictures", "samples") for name in storage.list_files(storage.join(url, stage, folder))]
        return marks + shown
    return storage.list_files(storage.join(url, stage))
