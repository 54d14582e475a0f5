"""Decoding, and the paper's two augmentations (Listings 1 and 2). NumPy and Pillow; no torch.

AREA resizing is TensorFlow's ``resize_area`` with ``align_corners=True``, as the listings use it. One axis, ``in`` to ``out`` pixels, has the scale
``s = (in - 1) / (out - 1)``; output pixel i is the integral of the piecewise constant input over ``[i s, (i + 1) s]``, divided by s. For in > out
this s exceeds in / out, so the last intervals reach past the last pixel; it is then repeated. The axes are independent, so a resize is
``rows @ image @ columns``, and a crop of the result needs only its own rows and columns of the two matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import MAX_PIXELS
from data_pipeline.image_files import load_file, open_file, to_pixels
from infra.errors import DataError

Pixels = NDArray[np.uint8]
"""An image: uint8, height x width x 3, RGB."""


@dataclass(frozen=True)
class CropBox:
    """How a picture was cut from a stored image: enough to cut it again."""

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
    """Decode an image file into RGB as it is meant to be seen: upright by its EXIF orientation, the first frame, 8 bits, on white.

    Raises:
        DataError: not an image, damaged, or larger than ``MAX_PIXELS``.
    """
    return to_pixels(load_file(open_file(data, MAX_PIXELS)))


@lru_cache(maxsize=512)
def area_weights(size_in: int, size_out: int) -> NDArray[np.float32]:
    """Weights of AREA resizing along one axis, float32 [size_out, size_in]; every row sums to one.

    Raises:
        ValueError: a side is not positive, or the output is larger than the input.
    """
    if not 0 < size_out <= size_in:
        raise ValueError(f"area resize from {size_in} to {size_out} pixels: expected 0 < output <= input")
    scale = np.float32((size_in - 1) / (size_out - 1)) if size_out > 1 else np.float32(size_in)
    starts = np.arange(size_out, dtype=np.float32) * scale
    ends = np.arange(1, size_out + 1, dtype=np.float32) * scale
    cells = np.arange(int(np.ceil(ends[-1])), dtype=np.float32)
    overlap = np.minimum(ends[:, None], cells + 1) - np.maximum(starts[:, None], cells)
    weights = np.clip(overlap, 0, None) / scale
    inside: NDArray[np.float32] = weights[:, :size_in].astype(np.float32)
    inside[:, -1] += weights[:, size_in:].sum(axis=1)  # past the last pixel, the last pixel is repeated
    inside.setflags(write=False)
    return inside


def cut(image: Pixels, crop: CropBox, target: int) -> Pixels:
    """Apply a crop box: square, AREA resize, ``target`` x ``target`` crop, flip. Equal inputs give equal pixels."""
    left, top, right, bottom = crop.box
    square = image[top:bottom, left:right]
    side = right - left
    x, y = crop.offset
    if side == crop.resize:
        small = square[y : y + target, x : x + target]
    else:
        weights = area_weights(side, crop.resize)
        rows, columns = weights[y : y + target], weights[x : x + target]
        # [target, side] @ [side, side * 3] -> [target, side, 3] -> [3, target, side] @ [side, target] -> [3, target, target]
        half = (rows @ square.reshape(side, -1).astype(np.float32)).reshape(target, side, 3)
        whole = np.matmul(np.ascontiguousarray(half.transpose(2, 0, 1)), columns.T)
        small = np.rint(np.clip(whole, 0, 255)).astype(np.uint8).transpose(1, 2, 0)
    return np.ascontiguousarray(small[:, ::-1] if crop.flip else small)


def dvae_crop(size: tuple[int, int], target: int, scale_min: float, scale_max: float, rng: np.random.Generator) -> CropBox:
    """Draw a crop by Listing 1 (paper A.2): random square, random resize, random crop, random flip.

    Args:
        size: (width, height) of the stored image in pixels.
        target: side of the result in pixels.
        scale_min: smallest resize target over ``target`` (paper: 9/8).
        scale_max: largest resize target over ``target`` (paper: 12/8).
        rng: generator of this image and epoch.

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
        scale_max: largest resize target over ``target`` (paper: 9/8).
        rng: generator of this image and crop.

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
    """The central square, resized to ``target``: the one view that evaluation uses.

    Raises:
        DataError: the shorter side is below ``target``.
    """
    width, height = size
    side = _short_side(size, target)
    left, top = (width - side) // 2, (height - side) // 2
    return CropBox((left, top, left + side, top + side), target, (0, 0))


def listing1(image: Pixels, target: int, scale_min: float, scale_max: float, rng: np.random.Generator) -> tuple[Pixels, CropBox]:
    """``dvae_crop`` drawn and cut: the picture [target, target, 3] and its crop box."""
    crop = dvae_crop((image.shape[1], image.shape[0]), target, scale_min, scale_max, rng)
    return cut(image, crop, target), crop


def listing2(image: Pixels, target: int, scale_max: float, rng: np.random.Generator) -> tuple[Pixels, CropBox]:
    """``transformer_crop`` drawn and cut: the picture [target, target, 3] and its crop box."""
    crop = transformer_crop((image.shape[1], image.shape[0]), target, scale_max, rng)
    return cut(image, crop, target), crop


def center(image: Pixels, target: int) -> tuple[Pixels, CropBox]:
    """``center_crop`` cut: the picture [target, target, 3] and its crop box."""
    crop = center_crop((image.shape[1], image.shape[0]), target)
    return cut(image, crop, target), crop


def _short_side(size: tuple[int, int], target: int) -> int:
    side = min(size)
    if side < target:
        raise DataError(
            f"image of {size[0]} x {size[1]} pixels: crops of {target} need a shorter side of {target}; raise data.min_side and prepare again."
        )
    return side
