"""Draws a recorded picture again, by itself: the same codes and the same file."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from infra import storage
from infra.errors import ConfigError, DataError
from train.config import RunConfig
from train.drawing.draw import Batch, Picture, draw_batch
from train.drawing.memory import Room
from train.drawing.place import TRANSFORMERS, Place, locate
from train.drawing.samples import Line, encoded
from train.drawing.search import along, check_ancestry
from train.drawing.settings import Settings
from train.drawing.source import Models
from train.machine.rates import threads
from train.weights import export


def again(models: Models, line: Line) -> tuple[Picture, bytes]:
    """The picture of a line of samples.jsonl, and its file. Rounding in matrix products depends on how many rows are computed at once, though not on their
    content. So the picture is drawn at its old position in a batch of the old size, filled with the same caption. If it was drawn with ``deterministic``, it is
    drawn alone.

    Raises:
        DataError: the line names other weights than the model has, or what no drawing with this model has written.
    """
    check(models.cfg, models.url, models.lineage, line)
    shaped, settings, prefix = _shape(line)
    # All pictures of the batch are copies of the wanted candidate; all but one are thrown away.
    batch = Batch((line["caption"],) * shaped["captions"], (line["candidate"],) * shaped["each"])
    ancestry = shaped.get("ancestry")
    with threads(shaped["threads"]):
        drawn = along(models, batch, settings, ancestry, prefix) if ancestry else draw_batch(models, batch, settings, prefix)
    found = drawn[shaped["place"]]
    return found, encoded(found, line["file"].rsplit(".", 1)[-1])


def _shape(line: Line) -> tuple[dict[str, Any], Settings, list[int]]:
    """What shaped the picture, its settings, and the codes that were given."""
    shaped, shape = line["shaped_by"], dict(line["settings"])
    if shaped["deterministic"]:
        shaped = shaped | {"captions": 1, "each": 1, "place": 0}
    prefix = shape.pop("prefix", [])
    return shaped, replace(Settings(**shape), batch=shaped["captions"] * shaped["each"], window=shaped["window"]), prefix


def holding(place: Place, line: Line) -> Place:
    """The place with the transformer that drew a line, where the run has made two (stage align) and still has it; else the place itself."""
    others = [] if place.run is None else [place.run.at(stage, "export") for stage in TRANSFORMERS if stage != place.stage]
    for url in [place.dalle, *others]:
        marker = storage.join(url, export.DESCRIPTION)
        if storage.exists(marker) and export.describe(url)["content_hash"] == line["weights"].get("dalle"):
            return place if url == place.dalle else locate(url)
    return place


def check_room(room: Room, line: Line) -> None:
    """
    Raises:
        ConfigError: the batch in which the picture was drawn takes more memory than there is.
    """
    shaped, settings, _ = _shape(line)
    room.check(settings, shaped["captions"] * shaped["each"])


def check(cfg: RunConfig, url: str, lineage: dict[str, str], line: Line) -> None:
    """Refuse a line that a model cannot have drawn; before it is loaded, too. Lines come from strangers as well.

    Args:
        lineage: content hashes of the model's parts, as far as they are known.

    Raises:
        DataError: the message names the field.
    """
    for kind in sorted({"dalle", "dvae", "tokenizer"} & lineage.keys()):
        if line["weights"].get(kind) != lineage[kind]:
            raise DataError(
                f"{url}: its {kind} is {lineage[kind][:12]}, and the picture was drawn with {str(line['weights'].get(kind))[:12]}; "
                "name the run or the package that holds it."
            )
    (shaped, settings, prefix), shape = _shape(line), cfg.stream_shape()
    try:
        settings.check(cfg)
    except ConfigError as error:
        raise DataError(f"--again: settings of the line: {error}") from error
    if line["candidate"] >= settings.n:
        raise DataError(f"--again: candidate = {line['candidate']}: accepted are 0 to {settings.n - 1}, below the line's settings.n.")
    if shaped["place"] >= shaped["captions"] * shaped["each"]:
        raise DataError(
            f"--again: shaped_by.place = {shaped['place']}: its batch has {shaped['captions']} x {shaped['each']} pictures, counted from 0."
        )
    if shaped.get("ancestry"):
        check_ancestry(shaped["ancestry"], shape.image_tokens)
    if len(prefix) % shape.grid or len(prefix) >= shape.image_tokens or any(code >= shape.image_vocab for code in prefix):
        raise DataError(
            f"--again: settings.prefix has {len(prefix)} codes up to {max(prefix)}: accepted are whole rows of {shape.grid}, fewer than {shape.grid} of them, of "
            f"codes 0 to {shape.image_vocab - 1}."
        )


def verdict(line: Line, picture: Picture, data: bytes) -> str:
    """Say whether the picture is the same as the recorded one."""
    if hashlib.sha256(data).hexdigest() == line["sha256"]:
        return "the same codes and the same file"
    if picture.codes_hash == line["codes_sha256"]:
        return "the same codes, but another file: the decoder rounds differently on this device"
    now, then = picture.shaped_by, line["shaped_by"]
    odd = [f"{name} {then[name]} then, {now[name]} now" for name in ("device", "precision", "torch", "threads") if then[name] != now[name]]
    return f"other codes: rounding turned a code ({'; '.join(odd) or 'another processor'})"


def precision_of(line: Line, asked: str) -> str:
    """The precision to draw again with: the recorded one.

    Raises:
        ConfigError: another one was asked for.
    """
    recorded = str(line["shaped_by"]["precision"])
    if asked not in ("auto", recorded):
        raise ConfigError(f"--precision {asked}: the picture was drawn in {recorded}, and only that draws it again.")
    return recorded
