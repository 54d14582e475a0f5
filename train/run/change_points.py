"""Change points: updates from which on a training stage goes on with other values (docs/stage2.md, "Going on"). No torch.

A checkpoint holds the configuration that it was made with. Who restores it with another one begins a change point at that checkpoint: where it lies is
never guessed, also when the run falls back to an older checkpoint, and whatever was saved before stays as it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from infra import storage, stored
from infra.config import flatten
from infra.config_keys import ANY_TIME, GOING_ON, MAY_CHANGE, completed, declared
from infra.run_folder import commit
from infra.run_records import ChangePoint
from train.config import RunConfig

FILE = "changes.json"
"""In the stage's folder: its change points, for people and for the report."""


@dataclass(frozen=True)
class Curve:
    """The updates that the schedule of the step size spans."""

    start: int
    end: int

    @property
    def updates(self) -> int:
        return self.end - self.start


def may_change(key: str) -> bool:
    """Whether a run goes on with another value of a key at any time."""
    return declared(RunConfig, key).get(MAY_CHANGE) == ANY_TIME[MAY_CHANGE]


def stage_of(key: str) -> str:
    """The training stage that goes on with another value of a key from its newest checkpoint on; empty where none does."""
    section = key.partition(".")[0]
    return section.removesuffix("_fit") if declared(RunConfig, key).get(MAY_CHANGE) == GOING_ON[MAY_CHANGE] else ""


def changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Key -> [old value, new value] of two configurations; keys that the old one lacks have their value before they existed."""
    before, after = flatten(completed(RunConfig, old)), flatten(new)
    return {key: [before.get(key), after.get(key)] for key in sorted(before | after) if before.get(key) != after.get(key)}


def continued(meta: dict[str, Any], config: dict[str, Any], stage: str, how: str) -> list[dict[str, Any]]:
    """The change points of a run that goes on from a checkpoint: the checkpoint's own, and one at the checkpoint where its stage's values differ now.

    Args:
        meta: the checkpoint's facts.
        config: the configuration to go on with.
        stage: the training stage.
        how: what becomes of the schedule of the step size (FitSection.on_change).
    """
    points: list[dict[str, Any]] = list(meta.get("changes", []))
    new = {key: values for key, values in changed(meta["config"], config).items() if stage_of(key) == stage}
    if not new:
        return points
    step, fit = int(meta["step"]), config[f"{stage}_fit"]
    now = curve(points, int(completed(RunConfig, meta["config"])[f"{stage}_fit"]["steps"]))
    span = {"recomputed": Curve(now.start, fit["steps"]), "kept": now, "restarted": Curve(step, fit["steps"])}[how]
    point = {"step": step, "changed": new, "schedule": how, "curve": [span.start, span.end], "time": time.time(), "commit": commit()}
    return [*points, point]


def curve(points: list[dict[str, Any]], steps: int) -> Curve:
    """The updates that the schedule spans after these change points; of a run without one, all."""
    return Curve(*points[-1]["curve"]) if points else Curve(0, steps)


def read(stage_url: str) -> list[dict[str, Any]]:
    """The change points in a stage's folder, oldest first; none where it went through none.

    Raises:
        DataError: the file is damaged.
    """
    url = storage.join(stage_url, FILE)
    return stored.read_list(url, ChangePoint, "delete it: the stage writes it again from its checkpoint") if storage.exists(url) else []


def described(point: dict[str, Any]) -> str:
    """A change point in a line."""
    values = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in point["changed"].items())
    return f"from update {point['step']} on: {values}; schedule {point['schedule']}"
