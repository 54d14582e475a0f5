"""Pictures that show what the transformer had learned by a checkpoint: where they lie, and that they are drawn once. The stage generate draws kept checkpoints so,
and training draws its newest ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from infra import storage, stored
from infra.run_folder import RunFolder
from train.drawing.draw import draw
from train.drawing.settings import Settings
from train.drawing.source import Models
from train.report.images import enlarged, png_bytes, read_png
from train.weights import checkpoint

ENTRY = "entry.json"
PictureFile = Annotated[str, Field(pattern=r"^(generate|dalle/samples)/[A-Za-z0-9_-]{1,200}/[0-9]{1,9}\.png$")]
"""Name of a drawn picture in the run. The pattern allows only files in folders of drawings."""


class _Picture(stored.Stored):
    caption: str
    file: PictureFile


class Entry(stored.Stored):
    """The content of a checkpoint's entry.json."""

    step: int
    pictures: list[_Picture]


def folder(run: RunFolder, prefix: str, step: int, captions: Sequence[str], settings: Settings, lineage: dict[str, str]) -> str:
    """Folder of a checkpoint's pictures, relative to the run folder. Its name depends on everything that they depend on; the weights are identified by meta.json of
    their checkpoint.

    Raises:
        MissingError: the checkpoint has been deleted.
    """
    meta = storage.read_bytes(storage.join(checkpoint.folder(run.at("dalle"), step), "meta.json"))
    words = [list(captions), settings.shape(), lineage["dvae"], lineage["tokenizer"], hashlib.sha256(meta).hexdigest()]
    return f"{prefix}-{step:08d}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:12]}"


def is_drawn(run: RunFolder, place: str) -> bool:
    """Whether the pictures of a folder are complete."""
    return storage.exists(run.at(place, ENTRY))


def write(run: RunFolder, place: str, step: int, models: Models, captions: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Draw the pictures of one checkpoint, with models that hold its weights; the entry is written last."""
    entry: dict[str, Any] = {"step": step, "pictures": []}
    for number, picture in enumerate(picture for some in draw(models, captions, settings) for picture in some):
        name = f"{place}/{number:03d}.png"
        storage.write_bytes(run.at(name), png_bytes(picture.pixels_YXC))
        entry["pictures"].append({"caption": picture.caption, "file": name})
    storage.write_json(run.at(place, ENTRY), entry)
    return entry


def read(run: RunFolder, place: str) -> dict[str, Any]:
    """The entry of a folder whose pictures are complete."""
    return stored.read(run.at(place, ENTRY), Entry)


def pixels(run: RunFolder, pictures: Sequence[dict[str, Any]]) -> list[Any]:
    """Pictures of entries, large enough for TensorBoard."""
    return enlarged([read_png(storage.read_bytes(run.at(picture["file"]))) for picture in pictures])
