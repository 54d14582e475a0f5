"""Re-encodes images that exceed the size limits of a record."""

from __future__ import annotations

import io
from math import sqrt

from PIL import Image

from data_pipeline.config import FilterConfig
from data_pipeline.images.files import load_file, open_file, to_pixels

JPEG_QUALITY = 95
"""Quality of images that were lossy before; the others stay lossless, as PNG."""

_LOSSY = ("jpeg", "webp")
_MARGIN = 0.95  # a file shrinks a little less than the area of its image


def shrink(data: bytes, size: tuple[int, int], form: str, config: FilterConfig, min_side: int) -> tuple[bytes, tuple[int, int]]:
    """Bring an image file within ``max_image_bytes`` and ``max_side``, as far as that is possible with a shorter side of at least ``min_side``.

    Args:
        data: the original file; it is returned unchanged if it is within the limits.
        size: (width, height) in pixels, upright.
        form: one of config.ImageFormat.
        config: contains the limits.
        min_side: in pixels.

    Returns:
        The file and its (width, height). A re-encoded image is upright RGB on white, without metadata.

    Raises:
        DataError: the image cannot be decoded.
    """
    scale = min(1.0, config.max_side / max(size)) if config.max_side else 1.0
    if scale == 1.0 and not 0 < config.max_image_bytes < len(data):
        return data, size
    smallest = min(1.0, max(min_side, 1) / min(size))
    image = Image.fromarray(to_pixels(load_file(open_file(data, config.max_pixels))))
    while True:
        scale = max(scale, smallest)
        target = (max(1, round(scale * size[0])), max(1, round(scale * size[1])))
        encoded = _encode(image if target == size else image.resize(target, Image.Resampling.BICUBIC), form)
        if target == size and len(encoded) >= len(data) and scale == smallest:
            return data, size  # it may not be scaled down further, and encoding it again made the file larger
        if not 0 < config.max_image_bytes < len(encoded) or scale == smallest:
            return encoded, target
        scale *= _MARGIN * sqrt(config.max_image_bytes / len(encoded))


def _encode(image: Image.Image, form: str) -> bytes:
    out = io.BytesIO()
    if form in _LOSSY:
        image.save(out, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(out, "PNG")
    return out.getvalue()
