"""Where the checkpoints of a training stage lie, and which of them are complete. Needs no torch: launchers and job scripts ask too."""

from __future__ import annotations

import re
from collections.abc import Iterator

from infra import storage

META = "meta.json"
"""Written last: a checkpoint exists once this file does."""
_STEP = re.compile(r"step-([0-9]{1,15})/")


def folder(stage_url: str, step: int) -> str:
    """URL of the checkpoint after ``step`` updates."""
    return storage.join(stage_url, "checkpoints", f"step-{step:08d}")


def complete(stage_url: str) -> Iterator[int]:
    """Steps of the complete checkpoints, the newest first. Each folder is looked into only when its step is asked for."""
    names = storage.list_level(storage.join(stage_url, "checkpoints"))
    steps = sorted((int(found[1]) for name in names if (found := _STEP.fullmatch(name))), reverse=True)
    return (step for step in steps if storage.exists(storage.join(folder(stage_url, step), META)))
