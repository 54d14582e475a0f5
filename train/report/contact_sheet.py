"""A contact sheet: small pictures in a grid, each above its caption, which shows what is in a data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from train.report.images import INK, WHITE, Pixels
from train.report.labels import LABEL_SIZE, legible, wrap

TILE = 160
"""Side of the square in which a picture is shown, in pixels."""
_LINES, _PAD, _LEADING = 3, 8, 15
_BEHIND = (240, 240, 238)


def contact_sheet(pictures: Sequence[Pixels | None], captions: Sequence[str], columns: int = 8) -> Pixels:
    """Pictures of any size, shrunk or enlarged into equal squares without distortion, with up to three lines of caption below each.

    Args:
        pictures: uint8 [H, W, 3]; None leaves the square empty, for a picture that cannot be decoded.
        captions: one for each picture, in printable characters.
        columns: pictures in a row.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: there are no pictures, or not as many captions as pictures.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: give one caption for each picture, and at least one")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    step_x, step_y = TILE + _PAD, TILE + _PAD + _LINES * _LEADING + _PAD // 2
    canvas = Image.new("RGB", (_PAD + columns * step_x, _PAD + rows * step_y), WHITE)
    draw = ImageDraw.Draw(canvas)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = _PAD + index % columns * step_x, _PAD + index // columns * step_y
        draw.rectangle((left, top, left + TILE - 1, top + TILE - 1), fill=_BEHIND)
        if picture is not None:
            small = thumbnail(picture)
            canvas.paste(Image.fromarray(small), (left + (TILE - small.shape[1]) // 2, top + (TILE - small.shape[0]) // 2))
        text, face = legible(" ".join(caption.split()), LABEL_SIZE - 1)
        for line, words in enumerate(wrap(text, TILE, _LINES, face)):
            draw.text((left, top + TILE + 3 + line * _LEADING), words, fill=INK, font=face)
    return np.asarray(canvas)


def thumbnail(picture_YXC: Pixels) -> Pixels:
    """A picture scaled so that its longer side is at most TILE. Small ones are enlarged by whole factors with hard edges, so that their pixels are visible."""
    height, width = picture_YXC.shape[:2]
    longer = max(height, width)
    image = Image.fromarray(picture_YXC)
    if longer <= TILE:
        factor = TILE // longer
        return np.asarray(image.resize((width * factor, height * factor), Image.Resampling.NEAREST))
    size = (max(1, round(width * TILE / longer)), max(1, round(height * TILE / longer)))
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3))
