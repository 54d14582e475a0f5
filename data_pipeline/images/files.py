"""Opening image files that anybody may have made. Whatever the bytes, the outcome is pixels or a DataError, in bounded memory.

How each kind of image is shown: of several frames or pages the first; by EXIF orientation upright; transparency on white; palettes and grey
levels as the colours they stand for; 16 bits by their upper 8; CMYK by Pillow's plain formula. Colour profiles are not applied.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from infra.errors import DataError

# Pillow's own limit on pixels is a warning up to twice its value, and ours come first. Set once, for catch_warnings() is not safe in threads.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened at all. Pillow knows forty formats more, some of which run other programs; and AVIF is not in every build of it."""

MAX_SCANS = 100
"""Scans of a JPEG. Progressive ones have about ten; each costs a pass over the whole image, so that thousands stall a decoder."""

WEBP_DIVISOR = 2
"""WebP files may have this much fewer pixels than others: its decoder holds four copies."""

_STRIP_PIXELS = 2_000_000  # larger images are converted in strips, so that no second copy of them is made
_ALPHA_MODES = ("RGBA", "LA", "PA", "La", "RGBa")
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_IMAGE_WIDTH = 256
_IMAGE_LENGTH = 257
_ORIENTATION = 274
_BITS_PER_SAMPLE = 258
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BombError(DataError):
    """A file that asks for far more memory or time than an image of its size may."""


@contextmanager
def _as_data_error() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on hostile bytes
        if "decompressed data too large" in str(error).lower():  # texts and profiles of a PNG
            raise BombError(f"image with metadata that unpack to far more than they are ({error}); encode it again without them.") from error
        raise DataError(f"image cannot be decoded ({type(error).__name__}: {error}); replace it or remove it from the source.") from error


def open_file(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header of an image file; nothing is decoded yet.

    Raises:
        BombError: more than ``max_pixels`` pixels, or more than ``MAX_SCANS`` scans.
        DataError: not an image of one of ``FORMATS``, a damaged header, or pixels of 32 bits.
    """
    with _as_data_error():
        _check_pixels(*_webp_size(data), max_pixels // WEBP_DIVISOR)  # before opening, which already reserves the canvas
        if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
            raise BombError(f"JPEG of {data.count(bytes([0xFF, 0xDA]))} scans: at most {MAX_SCANS} are accepted; encode it again.")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"no {', '.join(FORMATS)}, or a damaged header; starts with {data[:12]!r}") from None
        assert isinstance(image, ImageFile.ImageFile)
        _check_pixels(*image.size, max_pixels)
        if not (image.mode in _ALPHA_MODES or image.mode in _PLAIN_MODES or image.mode.startswith("I;16") or _is_png16(data)):
            raise DataError(f"image of Pillow's mode '{image.mode}': its pixels are no 8 or 16 bit colours; convert it or remove it from the source.")
        return image


def load_file(image: ImageFile.ImageFile, grey_of_side: int = 0) -> Image.Image:
    """Decode a file from ``open_file`` and turn it upright.

    Args:
        image: the opened file.
        grey_of_side: where the format can do it cheaply (JPEG), decode to grey levels at the smallest scale with both sides at least this;
            every byte is still read. 0: as it is.

    Raises:
        DataError: the file is damaged or truncated.
    """
    with _as_data_error():
        turn = None if image.format == "TIFF" else _UPRIGHT.get(orientation(image))  # Pillow turns TIFF itself
        if grey_of_side:
            image.draft("L", (grey_of_side, grey_of_side))
        image.load()
        if image.format == "BMP" and image.mode == "RGBA" and is_invisible(image):
            image.putalpha(255)  # many programs write 32 bits and leave the last eight empty: they mean colours, not nothing
        return image if turn is None else image.transpose(turn)


def shown_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """(width, height) of an opened file as ``load_file`` turns it."""
    # Versions of Pillow differ in whether the size of a TIFF is upright before it is decoded; its tags are not.
    width, height = (_tag(image, _IMAGE_WIDTH), _tag(image, _IMAGE_LENGTH)) if image.format == "TIFF" else image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation of an opened file, 1 to 8; 1 where there is none before the pixels, or garbage."""
    try:
        if image.format == "TIFF":
            found = _tag(image, _ORIENTATION)
        else:
            found = image.getexif().get(_ORIENTATION) if "exif" in image.info else 1
    except Exception:  # garbage in EXIF does not make an image unreadable
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def kinds(image: ImageFile.ImageFile, data: bytes) -> set[str]:
    """Which kinds of config.ImageKind an opened file is; whether it is 'transparent' shows when it is decoded (``is_transparent``).

    Raises:
        DataError: what follows the first frame is damaged.
    """
    with _as_data_error():
        bits = _tag(image, _BITS_PER_SAMPLE)
        deep = image.mode.startswith("I") or _is_png16(data) or (max(bits) if isinstance(bits, tuple) and bits else 0) > 8
        found = {
            # A phone's MPO is a JPEG with previews behind it, no animation.
            "animated": image.format != "MPO" and getattr(image, "is_animated", False),
            "cmyk": image.mode == "CMYK",
            "16-bit": deep,
            "palette": image.mode in ("P", "PA"),
            "greyscale": image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I"),
            "rotated": orientation(image) != 1,
        }
        return {kind for kind, is_so in found.items() if is_so}


def is_transparent(image: Image.Image) -> bool:
    """Whether a decoded image has a pixel that is not opaque. An alpha channel alone does not make it transparent."""
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return False
    return any(strip.convert("RGBA").getchannel("A").getextrema()[0] != 255 for _, strip in _strips(image))


def is_invisible(image: Image.Image) -> bool:
    """Whether every pixel of a decoded image is fully transparent: on white, nothing of it would be seen."""
    if image.mode not in _ALPHA_MODES and "transparency" not in image.info:
        return False
    return all(strip.convert("RGBA").getchannel("A").getextrema()[1] == 0 for _, strip in _strips(image))


def to_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """RGB pixels of a decoded image, uint8 [height, width, 3].

    Raises:
        DataError: the pixels cannot be converted.
    """
    with _as_data_error():
        return _gather(image, _to_rgb, (3,))


def to_grey(image: Image.Image) -> NDArray[np.uint8]:
    """Grey levels (ITU-R 601) of a decoded image, uint8 [height, width].

    Raises:
        DataError: the pixels cannot be converted.
    """
    with _as_data_error():
        return _gather(image, lambda strip: _to_rgb(strip).convert("L") if strip.mode != "L" or strip.info else strip, ())


def _gather(image: Image.Image, convert: Callable[[Image.Image], Image.Image], channels: tuple[int, ...]) -> NDArray[np.uint8]:
    if image.width * image.height <= _STRIP_PIXELS:
        return np.asarray(convert(image))
    out = np.empty((image.height, image.width, *channels), dtype=np.uint8)
    for top, strip in _strips(image):
        out[top : top + strip.height] = np.asarray(convert(strip))
    return out


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255; a tRNS chunk of one level is not worth a second path
        levels = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if rgba.getchannel("A").getextrema() != (255, 255):
            rgba = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        return rgba.convert("RGB")
    return image.convert("RGB")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BombError(f"image of {width} x {height} pixels: at most {max_pixels:,} are accepted; shrink it or remove it from the source.")


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) that a WebP file claims; (0, 0) for other files."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def _is_png16(data: bytes) -> bool:
    return data.startswith(b"\x89PNG") and data[12:16] == b"IHDR" and data[24:25] == b"\x10"


def _tag(image: Image.Image, number: int) -> Any:
    """A tag of a TIFF file, None where it has none or is no TIFF."""
    tags = getattr(image, "tag_v2", None)
    return tags.get(number) if image.format == "TIFF" and tags is not None else None
