"""Turns a given image into the first rows of a picture's codes (paper 2.9). The image may have any size; it is cropped or shrunk to the model's square."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from data_pipeline.images.crops import decode
from infra import storage
from infra.errors import DataError
from train.drawing.settings import Fit
from train.drawing.source import Models

_KEPT = 15 / 32
"""The fraction of the rows that is kept by default, as in the paper."""
_MOST_STRETCH = 64
"""The longer side of an image may be at most this many times the shorter one; for a longer image, less than a pixel would be left."""


def kept_rows(grid: int, keep_rows: int | None) -> int:
    """How many of a picture's rows of codes are taken from the image."""
    return max(1, min(grid - 1, round(_KEPT * grid))) if keep_rows is None else keep_rows


def read(url: str, size: int, fit: Fit) -> Image.Image:
    """Read an image file as a square of ``size`` pixels.

    Raises:
        DataError: the file is missing or damaged, or the image is too large or too long; the message names the file.
    """
    data = storage.read_bytes(url)
    try:
        return square(Image.fromarray(decode(data)), size, fit)
    except DataError as error:
        raise DataError(f"{url}: {error}") from error


def square(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    """The central square of an image ('crop'), or the whole image on a white square ('letterbox'), scaled to ``size`` pixels.

    Raises:
        DataError: one side of the image is much longer than the other.
    """
    width, height = image.size
    if max(width, height) > _MOST_STRETCH * min(width, height):
        raise DataError(f"an image of {width} x {height} pixels is too long to be continued; at most {_MOST_STRETCH} to 1 is accepted.")
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, (left, top, left + side, top + side))
    scale = size / max(width, height)
    inside = image.convert("RGB").resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(inside, ((size - inside.width) // 2, (size - inside.height) // 2))
    return canvas


def codes(models: Models, image: Image.Image, keep_rows: int | None) -> list[int]:
    """The codes of an image's first rows."""
    grid = models.cfg.dvae.grid
    rows = kept_rows(grid, keep_rows)
    pixels_13YX = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(255).to(models.device)
    found: list[int] = models.dvae.encode(pixels_13YX)[0, :rows].flatten().tolist()
    assert len(found) == rows * grid
    return found
