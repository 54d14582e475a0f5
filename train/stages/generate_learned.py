"""Shows what the transformer had learned at each kept checkpoint: draws the same few captions with the same seeds and its averaged weights. Part of the stage
generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from infra.errors import CheckpointError, MissingError
from infra.run_folder import RunFolder
from train.drawing import learned
from train.drawing.settings import Settings
from train.drawing.source import Models, replaced_weights
from train.loop.metrics import MetricsWriter
from train.report.images import grid
from train.weights import checkpoint

CAPTIONS = 6
"""How many of the stage's captions are drawn, the first ones; one picture each."""


@dataclass(frozen=True)
class Learned:
    """The checkpoints to draw with, and how."""

    run: RunFolder
    captions: tuple[str, ...]
    settings: Settings
    folders: dict[int, str]
    """Step of each checkpoint -> folder of its pictures, relative to the run folder."""

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints, oldest first."""
        return sorted(self.folders)

    def draw(self, models: Models, step: int) -> None:
        """Draw the pictures of one checkpoint. Does nothing if they exist, or if the checkpoint has been deleted meanwhile."""
        if learned.is_drawn(self.run, self.folders[step]):
            return
        tensors = _average(self.run, step)
        if tensors is not None:
            learned.write(self.run, self.folders[step], step, replaced_weights(models, tensors), self.captions, self.settings)

    def entries(self) -> list[dict[str, Any]]:
        """The entries of the checkpoints that have been drawn, oldest first."""
        return [learned.read(self.run, self.folders[step]) for step in self.steps if learned.is_drawn(self.run, self.folders[step])]


def plan(run: RunFolder, captions: Sequence[str], settings: Settings, lineage: dict[str, str], most: int) -> Learned:
    """Choose at most ``most`` of the kept checkpoints, evenly spaced, the first and the newest included."""
    some, one = tuple(captions[:CAPTIONS]), replace(settings, n=1, search=False)
    folders = {}
    for step in _spread(checkpoint.complete(run.at("dalle")), most):
        with suppress(MissingError):  # deleted meanwhile: training may continue while this stage draws
            folders[step] = learned.folder(run, "generate/learned", step, some, one, lineage)
    return Learned(run, some, one, folders)


def _spread(steps: list[int], most: int) -> Iterator[int]:
    if most >= len(steps):
        yield from steps
    elif most == 1:
        yield steps[-1]
    else:
        yield from (steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most))


def _average(run: RunFolder, step: int) -> dict[str, Tensor] | None:
    """Averaged weights of a checkpoint; None if it has been deleted meanwhile."""
    folder = checkpoint.folder(run.at("dalle"), step)
    try:
        return checkpoint.read_tensors(folder, "average")
    except (CheckpointError, MissingError):
        if step in checkpoint.complete(run.at("dalle")):
            raise
        return None


def to_tensorboard(run: RunFolder, captions: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]], shown: int, step: int) -> None:
    """Log the best pictures of each caption, and the pictures of the same captions at each checkpoint."""
    writer = MetricsWriter(run.url, "generate", 0, lines=False)
    for entry in entries:
        for picture, array in zip(entry["pictures"], learned.pixels(run, entry["pictures"]), strict=True):
            writer.images(entry["step"], f"2 learned/{picture['caption']}", array)
    for caption in captions:
        writer.images(step, f"1 drawn/{caption['caption']}", grid([learned.pixels(run, caption["pictures"][:shown])]))
    writer.close()
