"""Change points: updates after which a training stage continues with other values of its configuration (docs/stage2.md, "Going on"). Needs no torch.

A checkpoint holds the configuration that it was made with. If it is restored with another one, a change point begins at that checkpoint. So the place is
always known exactly, also when a run falls back to an older checkpoint, and everything that was saved before stays valid.
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
"""File in the stage's folder that lists its change points, for people and for the report."""


@dataclass(frozen=True)
class Curve:
    """The range of updates over which the learning rate schedule runs."""

    start: int
    end: int

    @property
    def updates(self) -> int:
        return self.end - self.start


def may_change(key: str) -> bool:
    """Whether a run may continue with another value of a key at any time."""
    return declared(RunConfig, key).get(MAY_CHANGE) == ANY_TIME[MAY_CHANGE]


def stage_of(key: str) -> str:
    """The training stage that may continue with another value of a key from its newest checkpoint on; empty if none may."""
    section = key.partition(".")[0]
    return section.removesuffix("_fit") if declared(RunConfig, key).get(MAY_CHANGE) == GOING_ON[MAY_CHANGE] else ""


def changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """Key -> [old value, new value] for the differences of two configurations. A key that the old one lacks counts with the value that stands for the behaviour
    before the key existed."""
    before, after = flatten(completed(RunConfig, old)), flatten(new)
    return {key: [before.get(key), after.get(key)] for key in sorted(before | after) if before.get(key) != after.get(key)}


def continued(meta: dict[str, Any], config: dict[str, Any], stage: str, how: str) -> list[dict[str, Any]]:
    """The change points of a run that continues from a checkpoint: those that the checkpoint holds, and a new one if values of its stage are different now.

    Args:
        meta: the content of the checkpoint's meta.json.
        config: the configuration to continue with.
        stage: the training stage.
        how: what happens to the learning rate schedule (FitSection.on_change).
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
    """The range of updates over which the schedule runs after these change points; without change points, all ``steps``."""
    return Curve(*points[-1]["curve"]) if points else Curve(0, steps)


def read(stage_url: str) -> list[dict[str, Any]]:
    """The change points of a stage, oldest first; empty if it has none.

    Raises:
        DataError: the file is damaged.
    """
    url = storage.join(stage_url, FILE)
    return stored.read_list(url, ChangePoint, "delete it: the stage writes it again from its checkpoint") if storage.exists(url) else []


def described(point: dict[str, Any]) -> str:
    """Describe a change point in one line."""
    values = ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in point["changed"].items())
    return f"from update {point['step']} on: {values}; schedule {point['schedule']}"
