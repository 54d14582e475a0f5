"""Finds the nearest training image of each drawn picture: in one pass over the set for all pictures of a rank. Only the files of the images that were found are
kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from data_pipeline.images.crops import Pixels, center_crop, cut, decode
from data_pipeline.shards.shard_set import ShardSet

_THUMB = 16
_BLOCK = 512
"""Number of training images that are compared at a time."""


@dataclass(frozen=True)
class Nearest:
    """A picture's nearest training image."""

    id: str
    image: bytes
    distance: float
    """Root mean square difference of the two coarse pictures, in [0, 1]."""


def view(image: bytes, size: int) -> Pixels:
    """The central crop of a stored image, uint8 [size, size, 3]."""
    pixels = decode(image)
    return cut(pixels, center_crop((pixels.shape[1], pixels.shape[0]), size), size)


def thumbs(pictures_BYXC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Coarse pictures [B, 768] in [0, 1]: the means over the cells of a 16 x 16 grid. So pictures count as near by layout and colour, not by noise."""
    batch, size = pictures_BYXC.shape[:2]
    side = min(_THUMB, size)
    block = size // side
    cropped = pictures_BYXC[:, : side * block, : side * block].reshape(batch, side, block, side, block, 3)
    return (cropped.mean((2, 4), dtype=np.float32) / 255).reshape(batch, -1)


def nearest(
    thumbs_BF: NDArray[np.float32], training: ShardSet, size: int, among: int, go_on: Callable[[int], bool] = lambda done: True
) -> list[Nearest] | None:
    """For each picture, find the nearest of the first ``among`` visible training images.

    Reads and decodes each of those images once, however many pictures there are, and takes 2 · 768 FLOPs for each pair.

    Args:
        thumbs_BF: the coarse pictures (``thumbs``).
        training: an image set.
        size: side of the pictures; the images are cropped to it.
        among: number of images that are searched.
        go_on: called before each block with the number of images that have been searched; if it returns False, the search ends.

    Returns:
        One for each picture, or None if ``go_on`` ended the search.
    """
    squared_B = np.full(len(thumbs_BF), np.inf, np.float32)
    position_B = np.zeros(len(thumbs_BF), np.int64)
    length_B = (thumbs_BF**2).sum(1)
    images, done = islice(_visible(training), min(among, training.count)), 0
    while block := list(islice(images, _BLOCK)):
        if not go_on(done):
            return None
        theirs_KF = thumbs(np.stack([view(image, size) for _, image in block]))
        found_BK = (length_B[:, None] + (theirs_KF**2).sum(1)[None] - 2 * thumbs_BF @ theirs_KF.T) / theirs_KF.shape[1]
        best_B = found_BK.argmin(1)
        least_B = np.maximum(0.0, found_BK[np.arange(len(best_B)), best_B])  # rounding can make the difference of products negative
        closer_B = least_B < squared_B
        squared_B[closer_B] = least_B[closer_B]
        position_B[closer_B] = np.array([position for position, _ in block])[best_B[closer_B]]
        done += len(block)
    return _read(thumbs_BF, training, position_B, size) if done else []


def _visible(training: ShardSet) -> Iterator[tuple[int, bytes]]:
    """Position and image file of each visible record, in order."""
    for part in range(len(training.parts)):
        shown = np.delete(np.arange(training.parts[part]["count"]), training.removed_rows(part)) + training.starts[part]
        for position, record in zip(shown, training.read_part(part), strict=True):
            yield int(position), record["image"]


def _read(thumbs_BF: NDArray[np.float32], training: ShardSet, position_B: NDArray[np.int64], size: int) -> list[Nearest]:
    """Read the images that were found. An image that several pictures have in common is read once.

    The distances are computed again, pair by pair: those of the search are differences of products, whose last bits depend on the sizes of the blocks.
    """
    wanted, place_B = np.unique(position_B, return_inverse=True)
    records = training.rows_at(wanted)
    theirs = [thumbs(view(record["image"], size)[None])[0] for record in records]
    return [
        Nearest(records[place]["id"], records[place]["image"], float(np.sqrt(((ours_F - theirs[place]) ** 2).mean())))
        for ours_F, place in zip(thumbs_BF, place_B, strict=True)
    ]
