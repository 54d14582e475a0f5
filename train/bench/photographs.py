"""Generates JPEG files with the statistics of photographs, for benchmarks of decoding. They are made from a seed, so that no data set must be downloaded.

The speed of a decoder depends on how many coefficients the blocks have. In photographs, amplitudes are proportional to one over the frequency and smaller near the
limit of the lens; there are edges where objects hide each other; colour varies less than brightness; and the sensor adds some noise.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90
SEED = 2021
_LEAVES = 40
_SENSOR_NOISE = 1.0
"""Standard deviation, in levels."""
_FALL = 1.25
"""Amplitudes are proportional to one over the frequency to this power, which is 1.0 to 1.3 in photographs."""
_LUMA_CHROMA = np.array([[1.0, 0.2, 0.12], [1.0, -0.06, -0.15], [1.0, -0.12, 0.24]], dtype=np.float32)
"""The red, green and blue parts of three independent fields, the first of which is brightness."""


def files(count: int = 1000, seed: int = SEED) -> list[bytes]:
    """``count`` JPEG files of 500 x 375 pixels with quality 90 and halved chroma. They are kept in the temporary folder for the next call."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"bench-photographs-{os.getuid()}-{code}-{seed}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return [_kept(folder / f"{index:05d}.jpg", seed, index) for index in range(count)]


def _kept(path: Path, seed: int, index: int) -> bytes:
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(encode(photograph(seed, index)))
        partial.rename(path)  # so that a killed benchmark leaves no incomplete file under the final name
    return path.read_bytes()


def encode(pixels_YX3: NDArray[np.uint8], quality: int = QUALITY) -> bytes:
    """Encode a JPEG file with chroma halved on both axes, as is usual for cameras and the web."""
    out = io.BytesIO()
    Image.fromarray(pixels_YX3).save(out, "JPEG", quality=quality, subsampling="4:2:0")
    return out.getvalue()


def photograph(seed: int, index: int, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """Picture ``index``: a background of one-over-f noise, half of it hidden by ellipses of other colours; uint8 [height, width, 3]."""
    rng = np.random.default_rng((seed, index))
    field_YX3 = _one_over_f(rng, height, width)
    for _ in range(_LEAVES):
        _hide(field_YX3, rng)
    field_YX3 = (field_YX3 - field_YX3.mean()) / field_YX3.std()
    bright, contrast = rng.uniform(90, 150), rng.uniform(35, 60)
    noisy = bright + contrast * field_YX3 + rng.normal(0, _SENSOR_NOISE, field_YX3.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _hide(field_YX3: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Draw an ellipse over the field, in place. Sizes follow a power law, so there are many small and few large ellipses, and edges at every scale."""
    height, width = field_YX3.shape[:2]
    radius = 0.02 * height * rng.uniform(0.02, 1) ** -0.9
    cy, cx, squeeze, tilt = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.4, 1), rng.uniform(0, np.pi)
    rows, columns = (slice(max(0, int(center - radius)), int(center + radius) + 2) for center in (cy, cx))
    part_YX3 = field_YX3[rows, columns]
    dy = np.arange(rows.start, rows.start + part_YX3.shape[0], dtype=np.float32)[:, None] - np.float32(cy)
    dx = np.arange(columns.start, columns.start + part_YX3.shape[1], dtype=np.float32)[None] - np.float32(cx)
    u = dx * np.float32(np.cos(tilt)) + dy * np.float32(np.sin(tilt))
    v = (dy * np.float32(np.cos(tilt)) - dx * np.float32(np.sin(tilt))) / np.float32(squeeze)
    cover_YX1 = np.clip(np.float32(radius) - np.sqrt(u * u + v * v), 0, 1)[..., None]  # a soft edge of one pixel
    colour = _LUMA_CHROMA @ rng.normal(0, 1, 3).astype(np.float32)
    part_YX3 += cover_YX1 * (colour - part_YX3 / 2)


def _one_over_f(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Fields [height, width, 3] whose amplitudes are proportional to one over the frequency, and smaller near the highest frequencies."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    frequency = np.sqrt(fy * fy + fx * fx)
    frequency[0, 0] = np.inf
    lens = np.exp(-((frequency / 0.45) ** 2))
    spectrum = rng.normal(size=(3, *frequency.shape)) + 1j * rng.normal(size=(3, *frequency.shape))
    fields = np.fft.irfft2(spectrum * lens / frequency**_FALL, s=(height, width))
    fields /= fields.std(axis=(1, 2), keepdims=True)
    mixed: NDArray[np.float32] = (_LUMA_CHROMA @ fields.reshape(3, -1).astype(np.float32)).T.reshape(height, width, 3)
    return mixed
