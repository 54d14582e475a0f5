"""Decoding of images, and the paper's two augmentations (Listings 1 and 2). No torch.

A crop is first drawn, then cut: ``dvae_crop``, ``transformer_crop`` and ``center_crop`` choose a ``CropBox`` for an image's size, and ``cut`` applies it.
``picture`` does both for an image file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from data_pipeline.config import MAX_PIXELS
from data_pipeline.images.area_resize import Pixels, resize
from data_pipeline.images.files import load_file, open_file, to_pixels
from data_pipeline.images.jpeg import decode_jpeg, jpeg_size
from infra.errors import DataError

Decoding = Literal["exact", "fast"]
"""'exact': the pixels as in the paper. 'fast': halved chroma of a JPEG file is repeated instead of interpolated, if the resize averages it afterwards."""

_FAST_SHRINK = 1.25
"""'fast' applies if a picture is shrunk by at least this factor; at smaller ones its error on photographs would exceed -45 dB."""


@dataclass(frozen=True)
class CropBox:
    """How a crop was taken from a stored image: everything needed to take it again."""

    box: tuple[int, int, int, int]
    """Square in stored pixels: left, top, right, bottom."""
    resize: int
    """Side to which the square is resized."""
    offset: tuple[int, int]
    """Left and top of the final crop in the resized square."""
    flip: bool = False
    """Mirrored left to right, after the crop."""

    def to_json(self) -> dict[str, Any]:
        return {"box": list(self.box), "resize": self.resize, "offset": list(self.offset), "flip": self.flip}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> CropBox:
        left, top, right, bottom = tree["box"]
        x, y = tree["offset"]
        return cls(box=(left, top, right, bottom), resize=tree["resize"], offset=(x, y), flip=tree.get("flip", False))


def decode(data: bytes) -> Pixels:
    """Decode an image file into RGB as it is meant to be shown: upright by its EXIF orientation, the first frame, 8 bits, on white.

    Raises:
        DataError: not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    size = jpeg_size(data, MAX_PIXELS)
    jpeg = None if size is None else decode_jpeg(data)
    return to_pixels(load_file(open_file(data, MAX_PIXELS))) if jpeg is None else jpeg


def cut(image: Pixels, crop: CropBox, target: int) -> Pixels:
    """Apply a crop box: square, AREA resize, ``target`` x ``target`` crop, flip. Equal inputs give equal pixels.

    Raises:
        ValueError: the box is not a square inside the image, or the crop reaches out of the resized square.
    """
    return resize(image, crop.box, crop.resize, crop.offset, target, crop.flip)


Draw = Callable[[tuple[int, int]], CropBox]
"""Chooses a crop box for an image of (width, height) pixels."""


def picture(data: bytes, draw: Draw, target: int, decoding: Decoding = "exact") -> tuple[Pixels, CropBox]:
    """Decode an image file, draw a crop box for its size, and cut it.

    Returns:
        The picture [target, target, 3] and its crop box.

    Raises:
        DataError: the file cannot be decoded, or the image is too small for the crop.
    """
    size = jpeg_size(data, MAX_PIXELS)
    if size is None:
        image = decode(data)
        crop = draw((image.shape[1], image.shape[0]))
    else:
        crop = draw(size)
        shrinks = crop.box[2] - crop.box[0] >= _FAST_SHRINK * crop.resize
        jpeg = decode_jpeg(data, fast=shrinks and decoding == "fast")
        image = decode(data) if jpeg is None else jpeg
    return cut(image, crop, target), crop


def dvae_crop(size: tuple[int, int], target: int, scale_min: float, scale_max: float, rng: np.random.Generator) -> CropBox:
    """Draw a crop by Listing 1 (paper A.2): random square, random resize, random crop, random flip.

    Args:
        size: (width, height) of the stored image in pixels.
        target: side of the result in pixels.
        scale_min: smallest resize target, divided by ``target`` (paper: 9/8).
        scale_max: largest resize target, divided by ``target`` (paper: 12/8).
        rng: generator for this image and epoch.

    Raises:
        DataError: the shorter side is below ``target``.
    """
    width, height = size
    side = _short_side(size, target)
    left, top = int(rng.integers(0, width - side + 1)), int(rng.integers(0, height - side + 1))
    smallest, largest = min(side, round(scale_min * target)), min(side, round(scale_max * target))
    resize = int(rng.integers(smallest, largest + 1))
    x, y = (int(rng.integers(0, resize - target + 1)) for _ in range(2))
    return CropBox((left, top, left + side, top + side), resize, (x, y), flip=bool(rng.integers(0, 2)))


def transformer_crop(size: tuple[int, int], target: int, scale_max: float, rng: np.random.Generator) -> CropBox:
    """Draw a crop by Listing 2 (paper B.2): square from the middle quarter of the slack, resize, random crop, never a flip.

    Args:
        size: (width, height) of the stored image in pixels.
        target: side of the result in pixels.
        scale_max: largest resize target, divided by ``target`` (paper: 9/8).
        rng: generator for this image and crop.

    Raises:
        DataError: the shorter side is below ``target``.
    """
    side = _short_side(size, target)
    left, top = (_middle(length - side, rng) for length in size)
    resize = int(rng.integers(target, min(side, round(scale_max * target)) + 1))
    x, y = (int(rng.integers(0, resize - target + 1)) for _ in range(2))
    return CropBox((left, top, left + side, top + side), resize, (x, y))


def _middle(slack: int, rng: np.random.Generator) -> int:
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def center_crop(size: tuple[int, int], target: int) -> CropBox:
    """The central square, resized to ``target``: the only crop that evaluation uses.

    Raises:
        DataError: the shorter side is below ``target``.
    """
    width, height = size
    side = _short_side(size, target)
    left, top = (width - side) // 2, (height - side) // 2
    return CropBox((left, top, left + side, top + side), target, (0, 0))


def _short_side(size: tuple[int, int], target: int) -> int:
    side = min(size)
    if side < target:
        raise DataError(
            f"image of {size[0]} x {size[1]} pixels: crops of {target} need a shorter side of {target}; raise data.min_side and prepare again."
        )
    return side
