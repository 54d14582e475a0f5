"""Shows what the transformer had learned at each kept checkpoint: draws the same few captions with the same seeds and its averaged weights. Part of the stage
generate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from infra import storage, stored
from infra.errors import CheckpointError, MissingError
from infra.run_folder import RunFolder
from train.drawing.draw import draw
from train.drawing.settings import Settings
from train.drawing.source import Models, replaced_weights
from train.loop.metrics import MetricsWriter
from train.report.images import enlarged, grid, png_bytes, read_png
from train.weights import checkpoint

CAPTIONS = 6
"""How many of the stage's captions are drawn, the first ones; one picture each."""


PictureFile = Annotated[str, Field(pattern=r"^generate/[A-Za-z0-9_-]{1,200}/[0-9]{1,9}\.png$")]
"""Name of a drawn picture in the run. The pattern allows only files in a folder of the stage generate."""


class _Picture(stored.Stored):
    caption: str
    file: PictureFile


class _Entry(stored.Stored):
    """The content of a checkpoint's entry.json."""

    step: int
    pictures: list[_Picture]


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

    def _entry_url(self, step: int) -> str:
        return self.run.at(self.folders[step], "entry.json")

    def draw(self, models: Models, step: int) -> None:
        """Draw the pictures of one checkpoint; its entry is written last. Does nothing if they exist, or if the checkpoint has been deleted meanwhile."""
        if storage.exists(self._entry_url(step)):
            return
        tensors = _average(self.run, step)
        if tensors is None:
            return
        drawing = replaced_weights(models, tensors)
        found = [picture for some in draw(drawing, self.captions, self.settings) for picture in some]
        entry: dict[str, Any] = {"step": step, "pictures": []}
        for number, picture in enumerate(found):
            name = f"{self.folders[step]}/{number:03d}.png"
            storage.write_bytes(self.run.at(name), png_bytes(picture.pixels_YXC))
            entry["pictures"].append({"caption": picture.caption, "file": name})
        storage.write_json(self._entry_url(step), entry)

    def entries(self) -> list[dict[str, Any]]:
        """The entries of the checkpoints that have been drawn, oldest first."""
        return [stored.read(self._entry_url(step), _Entry) for step in self.steps if storage.exists(self._entry_url(step))]


def plan(run: RunFolder, captions: Sequence[str], settings: Settings, lineage: dict[str, str], most: int) -> Learned:
    """Choose at most ``most`` of the kept checkpoints, evenly spaced, the first and the newest included."""
    some, one = tuple(captions[:CAPTIONS]), replace(settings, n=1)
    folders = {}
    for step in _spread(checkpoint.complete(run.at("dalle")), most):
        try:
            meta = storage.read_bytes(storage.join(checkpoint.folder(run.at("dalle"), step), "meta.json"))
        except MissingError:  # deleted meanwhile: training may continue while this stage draws
            continue
        # Everything that the pictures depend on. The weights are identified by meta.json of their checkpoint.
        words = [some, one.shape(), lineage["dvae"], lineage["tokenizer"], hashlib.sha256(meta).hexdigest()]
        folders[step] = f"generate/learned-{step:08d}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]}"
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


def to_tensorboard(run: RunFolder, captions: Sequence[dict[str, Any]], learned: Sequence[dict[str, Any]], shown: int, step: int) -> None:
    """Log the best pictures of each caption, and the pictures of the same captions at each checkpoint."""
    writer = MetricsWriter(run.url, "generate", 0, lines=False)

    def pixels(pictures: Sequence[dict[str, Any]]) -> list[Any]:
        return enlarged([read_png(storage.read_bytes(run.at(picture["file"]))) for picture in pictures])

    for entry in learned:
        for picture in entry["pictures"]:
            writer.images(entry["step"], f"2 learned/{picture['caption']}", pixels([picture])[0])
    for caption in captions:
        writer.images(step, f"1 drawn/{caption['caption']}", grid([pixels(caption["pictures"][:shown])]))
    writer.close()
