"""Pictures for people: PNG bytes, grids with labels, and data URIs. H, W: rows and columns of pixels; C: red, green, blue."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, PngImagePlugin
from pydantic import Field

from data_pipeline.images.files import open_file
from infra import stored, strict_json
from infra.errors import DataError
from train.report.labels import LABEL_SIZE, Face, legible, wrap

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]

WHITE, INK = (255, 255, 255), (70, 74, 82)
_LAYOUT = "dalle-grid"
_INLINE_BYTES = 150_000
_LARGE_ENOUGH = 128
_MOST_PIXELS = 1 << 26
"""Pixels of a picture that is decoded: a small file can hold far more than memory does."""
_MOST_TILES = 1 << 12
_LEAST_WIDTH = 200
"""Pixels of a grid with labels: one small picture is too narrow for a caption."""
_MOST_LINES, _LINE = 3, LABEL_SIZE + 4


@dataclass(frozen=True)
class GridPng:
    """The pictures and labels of a file that ``grid_png`` wrote."""

    rows: list[list[Pixels]]
    labels: list[str]


_Side = Annotated[int, Field(ge=1, le=_MOST_PIXELS)]
_Place = Annotated[int, Field(ge=0, le=_MOST_PIXELS)]


class _Grid(stored.Stored):
    """The layout in the text chunk of a file that ``grid_png`` wrote."""

    tile_width: _Side
    tile_height: _Side
    pad: _Place
    tops: Annotated[list[_Place], Field(max_length=_MOST_TILES)]
    columns: Annotated[list[Annotated[int, Field(ge=0, le=_MOST_TILES)]], Field(max_length=_MOST_TILES)]
    labels: list[str]


def png_bytes(array_HWC: Pixels) -> bytes:
    """A picture as PNG.

    Raises:
        ValueError: the array is not uint8 of shape [H, W, 3].
    """
    buffer = io.BytesIO()
    Image.fromarray(_checked(array_HWC)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def read_png(data: bytes) -> Pixels:
    """The pixels of a PNG (or another format that images of a data set may have), uint8 [H, W, 3]; transparent ones are put on white.

    Raises:
        ValueError: the bytes are not a picture, or one of too many pixels.
    """
    picture = _opened(data)
    try:
        picture = picture.convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{len(data)} bytes are not a picture ({error})") from error
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, (*WHITE, 255)), picture).convert("RGB"))


def _opened(data: bytes) -> Image.Image:
    """A picture that is not decoded yet. Run folders come from strangers, too: Pillow's other formats would start programs (EPS) or read other files."""
    try:
        return open_file(data, _MOST_PIXELS)
    except DataError as error:
        raise ValueError(f"{len(data)} bytes are not a picture ({error})") from error


def enlarged(pictures: Sequence[Pixels], least: int = _LARGE_ENOUGH) -> list[Pixels]:
    """Pictures enlarged to sides of at least ``least`` pixels by repeating pixels, for viewers that do not scale them."""
    times = [max(1, -(-least // min(picture.shape[:2]))) for picture in pictures]
    return [picture.repeat(count, 0).repeat(count, 1) for picture, count in zip(pictures, times, strict=True)]


def grid(images: Sequence[Sequence[Pixels]], pad: int = 4, labels: Sequence[str] = ()) -> Pixels:
    """Rows of equally large pictures on white; if there are labels, each row has its label above it.

    Args:
        images: rows of uint8 [H, W, 3]; rows may differ in length.
        pad: pixels around and between pictures.
        labels: one for each row, in up to three lines of the grid's width; or empty.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: there are no pictures, their sizes differ, or the number of labels is not that of rows.
    """
    layout = _layout(images, pad, labels)
    canvas = Image.new("RGB", (layout["width"], layout["height"]), WHITE)
    draw = ImageDraw.Draw(canvas)
    texts = _texts(labels, layout["width"] - 2 * pad)
    for row, (top, pictures) in enumerate(zip(layout["tops"], images, strict=True)):
        if labels:
            said, face = texts[row]
            for number, line in enumerate(reversed(said), 1):
                draw.text((pad, top - number * _LINE), line, fill=INK, font=face)
        for column, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (pad + column * (layout["tile_width"] + pad), top))
    return np.asarray(canvas)


def grid_png(images: Sequence[Sequence[Pixels]], pad: int = 4, labels: Sequence[str] = ()) -> bytes:
    """``grid`` as a PNG that stores its layout in a text chunk, so that the report can show its pictures one by one.

    Raises:
        ValueError: as grid.
    """
    layout = _layout(images, pad, labels) | {"labels": list(labels), "columns": [len(row) for row in images], "pad": pad}
    info = PngImagePlugin.PngInfo()
    info.add_text(_LAYOUT, json.dumps(layout))
    buffer = io.BytesIO()
    Image.fromarray(grid(images, pad, labels)).save(buffer, "PNG", optimize=True, pnginfo=info)
    return buffer.getvalue()


def read_grid(data: bytes) -> GridPng | None:
    """The pictures of a file that ``grid_png`` wrote; None for any other picture.

    Raises:
        ValueError: the bytes are not a picture.
    """
    text = _opened(data).info.get(_LAYOUT)
    if text is None:
        return None
    pixels, layout = read_png(data), strict_json.loads(str(text))
    stored.check(layout, _Grid, "the layout of a grid of pictures")
    step, width, height = layout["tile_width"] + layout["pad"], layout["tile_width"], layout["tile_height"]
    across = max(layout["columns"], default=0)
    if max(layout["tops"], default=0) + height > len(pixels) or layout["pad"] + across * step > pixels.shape[1]:
        raise ValueError(f"a grid of pictures that do not lie in its {pixels.shape[1]} x {len(pixels)} pixels")
    rows = []
    for top, columns in zip(layout["tops"], layout["columns"], strict=True):
        lefts = [layout["pad"] + column * step for column in range(columns)]
        rows.append([pixels[top : top + height, left : left + width] for left in lefts])
    return GridPng(rows, layout["labels"])


def data_uri(data: bytes) -> str:
    """A picture as a data URI. Large ones are encoded as WebP, so that a report with many pictures stays small enough for a phone.

    Raises:
        ValueError: the bytes are not a picture.
    """
    kind = "png"
    if len(data) > _INLINE_BYTES:
        buffer = io.BytesIO()
        Image.fromarray(read_png(data)).save(buffer, "WEBP", quality=88, method=4)
        data, kind = buffer.getvalue(), "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _checked(array_HWC: Pixels) -> Pixels:
    if array_HWC.dtype != np.uint8 or array_HWC.ndim != 3 or array_HWC.shape[2] != 3:
        raise ValueError(f"a picture of {array_HWC.dtype}, shape {list(array_HWC.shape)}: expected uint8 of shape [H, W, 3]")
    return np.ascontiguousarray(array_HWC)


def _layout(images: Sequence[Sequence[Pixels]], pad: int, labels: Sequence[str]) -> dict[str, Any]:
    shapes = {_checked(picture).shape for row in images for picture in row}
    if len(shapes) != 1:
        raise ValueError(f"a grid needs pictures of one size, given: {sorted(shapes) or 'no pictures'}")
    if labels and len(labels) != len(images):
        raise ValueError(f"{len(labels)} labels for {len(images)} rows: give one for each row, or none")
    height, width, _ = shapes.pop()
    whole = max(pad + max(len(row) for row in images) * (width + pad), _LEAST_WIDTH if labels else 0)
    texts = _texts(labels, whole - 2 * pad)
    tops, end = [], 0
    for row in range(len(images)):
        tops.append(end + pad + (_LINE * max(1, len(texts[row][0])) + 4 if labels else 0))
        end = tops[-1] + height
    return {"tile_width": width, "tile_height": height, "tops": tops, "width": whole, "height": end + pad}


def _texts(labels: Sequence[str], width: int) -> list[tuple[list[str], Face]]:
    """The lines of each label, and the font that has their letters."""
    found = [legible(label) for label in labels]
    return [(wrap(text, width, _MOST_LINES, face), face) for text, face in found]


def to_array(picture_CYX: Tensor) -> NDArray[np.uint8]:
    """A picture in [0, 1] as uint8 [H, W, C]."""
    array: NDArray[np.uint8] = (picture_CYX.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return array
