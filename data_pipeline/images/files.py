"""Opens image files of unknown origin. Whatever the bytes, the result is pixels or a DataError, in bounded memory.

How special images are converted: of several frames or pages the first is taken; EXIF orientation turns the image upright; transparent images are put on
white; palettes and grey levels become RGB; of 16 bits the upper 8 are kept; CMYK is converted by Pillow's plain formula. Colour profiles are not applied.
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

# Our own limits on pixels come first; between once and twice Pillow's limit it would only warn. Set globally, because catch_warnings() is not thread-safe.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are opened at all. Pillow knows forty more, some of which start other programs; AVIF is missing in some builds of Pillow."""

MAX_SCANS = 100
"""Most scans of a JPEG. Progressive files have about ten. Each scan costs a pass over the whole image, so thousands would stall the decoder."""

WEBP_DIVISOR = 2
"""The limit on pixels is divided by this for WebP, whose decoder holds four copies of the image."""

_STRIP_PIXELS = 2_000_000  # larger images are converted in strips, to avoid a second full copy
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
    """A file that would take far more memory or time to decode than its size justifies."""


@contextmanager
def _as_data_error() -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # Pillow's plugins raise almost anything on hostile bytes
        if "decompressed data too large" in str(error).lower():  # a PNG's compressed text or colour profile
            raise BombError(f"image whose metadata is far larger when it is decompressed ({error}); encode it again without them.") from error
        raise DataError(f"image cannot be decoded ({type(error).__name__}: {error}); replace the file or leave it out.") from error


def open_file(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Read the header of an image file; nothing is decoded yet.

    Raises:
        BombError: it has more than ``max_pixels`` pixels or more than ``MAX_SCANS`` scans.
        DataError: it is not of one of the ``FORMATS``, its header is damaged, or its pixels have 32 bits a channel.
    """
    with _as_data_error():
        _check_pixels(*_webp_size(data), max_pixels // WEBP_DIVISOR)  # before Image.open, which already allocates the canvas of a WebP
        if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
            raise BombError(f"JPEG of {data.count(bytes([0xFF, 0xDA]))} scans: at most {MAX_SCANS} are accepted; encode it again.")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"no {', '.join(FORMATS)}, or a damaged header; starts with {data[:12]!r}") from None
        assert isinstance(image, ImageFile.ImageFile)
        _check_pixels(*image.size, max_pixels)
        if not (image.mode in _ALPHA_MODES or image.mode in _PLAIN_MODES or image.mode.startswith("I;16") or _is_png16(data)):
            raise DataError(
                f"image of Pillow's mode '{image.mode}': its pixels are not colours of 8 or 16 bits; convert it or remove it from the source."
            )
        return image


def load_file(image: ImageFile.ImageFile, grey_of_side: int = 0) -> Image.Image:
    """Decode a file from ``open_file`` and turn it upright.

    Args:
        image: the opened file.
        grey_of_side: if the format can do it cheaply (JPEG), decode to grey levels, at the smallest scale whose sides are both at least this long; the whole
            file is still read. 0: decode as usual.

    Raises:
        DataError: the file is damaged or truncated.
    """
    with _as_data_error():
        turn = None if image.format == "TIFF" else _UPRIGHT.get(orientation(image))  # Pillow turns TIFF itself
        if grey_of_side:
            image.draft("L", (grey_of_side, grey_of_side))
        image.load()
        if image.format == "BMP" and image.mode == "RGBA" and is_invisible(image):
            image.putalpha(255)  # many programs write 32-bit BMP with an unused alpha channel of zeros: the image is meant to be opaque
        return image if turn is None else image.transpose(turn)


def shown_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """(width, height) that an opened file has after ``load_file`` has turned it upright."""
    # Before a TIFF is decoded, image.size is upright in some versions of Pillow and not in others; the tags never are.
    width, height = (_tag(image, _IMAGE_WIDTH), _tag(image, _IMAGE_LENGTH)) if image.format == "TIFF" else image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def orientation(image: ImageFile.ImageFile) -> int:
    """EXIF orientation of an opened file, 1 to 8; 1 if there is none before the pixels, or if it is damaged."""
    try:
        if image.format == "TIFF":
            found = _tag(image, _ORIENTATION)
        else:
            found = image.getexif().get(_ORIENTATION) if "exif" in image.info else 1
    except Exception:  # an image with damaged EXIF data is still readable
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


def kinds(image: ImageFile.ImageFile, data: bytes) -> set[str]:
    """Which of the kinds config.ImageKind an opened file is. Whether it is 'transparent' is only known once it is decoded (``is_transparent``).

    Raises:
        DataError: the file is damaged after its first frame.
    """
    with _as_data_error():
        bits = _tag(image, _BITS_PER_SAMPLE)
        deep = image.mode.startswith("I") or _is_png16(data) or (max(bits) if isinstance(bits, tuple) and bits else 0) > 8
        found = {
            # An MPO, which phones write, is a JPEG with previews after it, and no animation.
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
    """Whether every pixel of a decoded image is fully transparent, so that nothing would be seen on white."""
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
    if image.mode.startswith("I"):  # Pillow's own conversion clips at 255. A single transparent level (tRNS) is ignored here
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
    """A tag of a TIFF file; None if the file lacks it or is not a TIFF."""
    tags = getattr(image, "tag_v2", None)
    return tags.get(number) if image.format == "TIFF" and tags is not None else None
