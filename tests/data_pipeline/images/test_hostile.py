"""Hostile files and captions: none crashes, hangs or fills the memory, and each is accepted or counted under a reason."""

from __future__ import annotations

import io
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.config import FilterConfig
from data_pipeline.filters.judge import EXAMPLE_LENGTH, Accepted, Dropped, judge
from data_pipeline.images import crops
from data_pipeline.images.files import MAX_SCANS, BombError, open_file
from data_pipeline.sources.pairs import Pair
from infra.errors import DataError
from tests.support.hostile import encode, hostile_captions, hostile_images, jpeg_of_many_scans, picture

CAPTION = "a brown dog runs across the field"
OPEN = FilterConfig(
    min_words=0, max_characters=0, broken_text=False, formats=("jpeg", "png", "webp", "gif", "bmp", "tiff"), refuse=(), max_aspect=0.0
)
IMAGE_REASONS = {"undecodable image", "decompression bomb", "image too small", "aspect ratio", "image format", "animated image"}
CAPTION_REASONS = {"empty caption", "broken text", "caption too short", "caption too long", "boilerplate", "repetitive caption", "not English"}
MEMORY_LIMIT = 300 << 20
SECONDS = 20.0
"""Of CPU for one file; the largest take about one on a slow machine."""


@lru_cache(maxsize=1)
def files() -> list[tuple[str, bytes]]:
    """(what it is, file): made once."""
    return list(hostile_images(seed=0, damaged=150))


def _peak() -> int:
    """Largest resident memory since the last ``_forget_peak``, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def _forget_peak() -> int:
    """Start measuring anew; resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def _check(image: bytes, caption: str, config: FilterConfig, min_side: int, reasons: set[str]) -> str:
    found = judge(Pair("id", (caption,), image, "source", "license", "group"), config, min_side)
    if isinstance(found, Dropped):
        assert found.reason in reasons
        assert len(found.example) <= EXAMPLE_LENGTH and found.example.isprintable() and "0x7f" not in found.example
        return found.reason
    assert isinstance(found, Accepted) and found.image and 0 <= found.perceptual_hash < 2**64 and 0 <= found.content_hash < 2**64
    return "accepted"


def test_hostile_images_are_accepted_or_counted_in_bounded_time_and_memory() -> None:
    outcomes: dict[str, int] = {}
    count = 0
    for name, data in files():
        count += 1
        for config, min_side in ((FilterConfig(), 16), (OPEN, 0)):
            before, start = _forget_peak(), time.process_time()
            outcome = _check(data, CAPTION, config, min_side, IMAGE_REASONS)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            assert time.process_time() - start < SECONDS, name
            assert _peak() - before < MEMORY_LIMIT, name
    assert count >= 230
    assert outcomes.keys() == IMAGE_REASONS | {"accepted"}, "every reason occurs"


def test_what_is_accepted_can_be_decoded_in_bounded_memory() -> None:
    for name, data in files():
        found = judge(Pair("id", (CAPTION,), data, "s", "l", "g"), OPEN, 0)
        if isinstance(found, Accepted):
            before = _forget_peak()
            pixels = crops.decode(found.image)
            assert _peak() - before < MEMORY_LIMIT, name
            assert pixels.shape == (found.height, found.width, 3), name


def test_hostile_captions_are_accepted_or_counted_in_bounded_time() -> None:
    image = encode(Image.linear_gradient("L").convert("RGB"))
    names = []
    for name, caption in hostile_captions(seed=0, random=200):
        names.append(name)
        for config in (FilterConfig(), OPEN):
            start = time.process_time()
            _check(image, caption, config, 0, CAPTION_REASONS)
            assert time.process_time() - start < 5, name
    assert len(names) >= 230


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SVG", "undecodable image"),
        ("EPS", "undecodable image"),
        ("PPM", "undecodable image"),
        ("zip bomb", "undecodable image"),
        ("png bomb of 10 gigapixels", "decompression bomb"),
        ("png with a text of 100 MB", "decompression bomb"),
        ("png with a profile of 100 MB", "decompression bomb"),
        ("jpeg of a thousand scans", "decompression bomb"),
        ("gif whose frame exceeds its screen", "decompression bomb"),
        ("webp that claims 16383 x 16383", "decompression bomb"),
        ("tiff that claims 100000 x 100000", "decompression bomb"),
        ("gif of 20000 frames", "animated image"),
        ("100000 x 1", "aspect ratio"),
        ("no pixels", "undecodable image"),
        ("exif that points at itself", "accepted"),
        ("exif of 60000 random bytes", "accepted"),
        ("profile of 60000 random bytes", "accepted"),
        ("png profile of 1000 random bytes", "accepted"),
        ("one colour", "accepted"),
    ],
)
def test_each_trick_has_its_outcome(name: str, expected: str) -> None:
    data = dict(files())[name]
    assert _check(data, CAPTION, FilterConfig(), 0, IMAGE_REASONS) == expected


def test_a_truncated_jpeg_is_noticed_at_any_scale_of_decoding() -> None:
    data = encode(picture(np.random.default_rng(0), 800, 600), "JPEG", quality=90)
    for length in (len(data) // 2, len(data) * 9 // 10, len(data) - 200):
        assert _check(data[:length], CAPTION, FilterConfig(), 0, IMAGE_REASONS) == "undecodable image"


def test_a_jpeg_of_too_many_scans_is_refused_by_count() -> None:
    rng = np.random.default_rng(0)
    assert open_file(jpeg_of_many_scans(rng, 50), 10**6).size == (256, 256)
    with pytest.raises(BombError, match=rf"JPEG of 109 scans: at most {MAX_SCANS} are accepted"):
        open_file(jpeg_of_many_scans(rng, 100), 10**6)


def test_what_is_no_image_says_how_it_starts() -> None:
    with pytest.raises(DataError, match=r"cannot be decoded .*no JPEG, PNG.*starts with b'<html>'.*replace the file or leave it out"):
        open_file(b"<html>", 10**6)


def test_metadata_that_unpack_to_a_hundred_megabytes_are_named() -> None:
    with pytest.raises(BombError, match="metadata is far larger when it is decompressed"):
        crops.decode(dict(files())["png with a text of 100 MB"])


def test_pillow_opens_none_of_its_other_formats() -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 64)).save(out, "PCX")
    with pytest.raises(DataError, match="cannot be decoded"):
        crops.decode(out.getvalue())
