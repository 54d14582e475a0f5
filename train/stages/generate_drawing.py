"""Which captions the stage generate draws, and the nearest training image of each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.images.crops import Pixels, center_crop, cut, decode
from data_pipeline.shards.shard_set import ShardSet
from infra.seeds import derive
from train.config import RunConfig

_THUMB = 16


@dataclass(frozen=True)
class Prompt:
    """A caption to draw."""

    caption: str
    id: str | None = None
    """Record that the caption comes from."""
    split: str | None = None
    """That record's split."""
    truth: bytes | None = None
    """That record's image file."""


def prompts(cfg: RunConfig, training: ShardSet, validation: ShardSet) -> list[Prompt]:
    """generate.captions, or captions of validation concepts (the first by stable hash) and of the most frequent training concepts."""
    if cfg.generate.captions:
        return [Prompt(caption) for caption in cfg.generate.captions]
    held_out = sorted(_one_for_each_group(validation), key=lambda record: derive(cfg.run.seed, "sample", record["group"]))
    chosen = held_out[: cfg.generate.num_captions]
    if cfg.generate.num_known_captions:
        frequency = Counter(record["group"] for record in training.records())
        known = sorted(_one_for_each_group(training), key=lambda record: (-frequency[record["group"]], record["group"]))
        chosen += known[: cfg.generate.num_known_captions]
    return [Prompt(record["captions"][0], record["id"], record["split"], record["image"]) for record in chosen]


def _one_for_each_group(images: ShardSet) -> Iterator[dict[str, Any]]:
    seen = set()
    for record in images.records():
        if record["group"] not in seen:
            seen.add(record["group"])
            yield record


def view(image: bytes, size: int) -> Pixels:
    """The central view of a stored image, uint8 [size, size, 3]."""
    pixels = decode(image)
    return cut(pixels, center_crop((pixels.shape[1], pixels.shape[0]), size), size)


def thumbs(pictures_BYXC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Coarse pictures [B, 768] in [0, 1]: means over a 16 x 16 grid, so that nearness is of layout and colour, not of noise."""
    batch, size = pictures_BYXC.shape[:2]
    side = min(_THUMB, size)
    block = size // side
    cropped = pictures_BYXC[:, : side * block, : side * block].reshape(batch, side, block, side, block, 3)
    return (cropped.mean((2, 4), dtype=np.float32) / 255).reshape(batch, -1)


@dataclass(frozen=True)
class Nearest:
    """A picture's nearest training image."""

    id: str
    image: bytes
    distance: float
    """Root mean square difference of the coarse pictures, in [0, 1]."""


def nearest(pictures_BYXC: NDArray[np.uint8], training: Iterable[dict[str, Any]], size: int, among: int, chunk: int = 512) -> list[Nearest]:
    """The nearest of the first ``among`` training images for each picture, read in chunks."""
    ours = thumbs(pictures_BYXC)
    best: list[Nearest | None] = [None] * len(ours)
    records: list[dict[str, Any]] = []

    def search() -> None:
        theirs = thumbs(np.stack([view(record["image"], size) for record in records]))
        squared = ((ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T) / ours.shape[1]
        for row, column in enumerate(squared.argmin(1)):
            distance = float(np.sqrt(max(0.0, squared[row, column])))
            found = best[row]
            if found is None or distance < found.distance:
                best[row] = Nearest(records[column]["id"], records[column]["image"], distance)

    for count, record in enumerate(training):
        if count == among:
            break
        records.append(record)
        if len(records) == chunk:
            search()
            records.clear()
    if records:
        search()
    return [found for found in best if found is not None]
