"""JPEG files without a detour, the fast option, whole pictures, and what the benchmark of images measures."""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import cbook
from PIL import Image

from data_pipeline.images import crops, jpeg
from data_pipeline.images.crops import CropBox
from infra.errors import DataError
from infra.seeds import generator
from tests.data_pipeline.images.test_crops import encoded, noise
from train.bench import data_images, harness, photographs
from train.machine import rates


def jpeg_file(picture: crops.Pixels, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", **options)
    return out.getvalue()


def pillow(data: bytes) -> crops.Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from(["4:2:0", "4:2:2", "4:4:4"]),
    st.sampled_from([30, 90, 100]),
    st.booleans(),
    st.integers(0, 9),
)
def test_jpeg_files_have_the_pixels_that_pillow_gives(width: int, height: int, chroma: str, quality: int, progressive: bool, seed: int) -> None:
    data = jpeg_file(noise(height, width, seed), quality=quality, subsampling=chroma, progressive=progressive)
    assert jpeg.jpeg_size(data, crops.MAX_PIXELS) == (width, height)
    found = jpeg.decode_jpeg(data)
    assert found is not None and np.array_equal(found, pillow(data))
    assert np.array_equal(crops.decode(data), found)


def test_a_grey_jpeg_has_the_pixels_that_pillow_gives() -> None:
    data = jpeg_file(noise(20, 30)[:, :, 0])
    found = jpeg.decode_jpeg(data)
    assert found is not None and np.array_equal(found, pillow(data))


def turned(orientation: int, description: str = "") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    if description:
        exif[0x010E] = description
    return jpeg_file(noise(20, 30), exif=exif)


def test_files_that_need_pillows_care_are_left_to_it() -> None:
    plain = jpeg_file(noise(20, 30))
    size = partial(jpeg.jpeg_size, max_pixels=600)
    assert size(plain) == (30, 20) == size(turned(1)) == size(turned(1, "a caption"))
    exif_without = Image.Exif()
    exif_without[0x010E] = "a caption"
    assert size(jpeg_file(noise(20, 30), exif=exif_without)) == (30, 20)
    assert size(turned(6)) is None and size(turned(3, "a caption")) is None, "to be turned"
    assert size(jpeg_file(noise(20, 30), xmp=b"<tiff:Orientation>6</tiff:Orientation>")) is None
    assert jpeg.jpeg_size(plain, 599) is None, "too large"
    assert size(encoded(Image.new("CMYK", (6, 5)), "JPEG")) is None
    assert size(encoded(Image.new("RGB", (6, 5)))) is None
    assert size(plain[:30]) is None and size(b"\xff\xd8\xff") is None
    broken = b"\xff\xe1\x00\x10Exif\0\0\x01\x12damage"
    assert size(plain[:2] + broken + plain[2:]) is None, "Exif that cannot be read"
    assert size(plain[:2] + b"\xff\xe0\xff\xff" + plain[2:]) is None, "markers that lead nowhere"


def test_a_truncated_or_damaged_jpeg_is_never_half_a_picture() -> None:
    data = jpeg_file(noise(64, 64), quality=90)
    assert jpeg.decode_jpeg(data[: len(data) // 2]) is None
    with pytest.raises(DataError, match="cannot be decoded"):
        crops.decode(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be decoded"):
        crops.picture(data[: len(data) // 2], partial(crops.center_crop, target=16), 16)


def test_a_picture_is_the_cut_of_the_decoded_image_for_every_format_and_either_decoding() -> None:
    draw = partial(crops.center_crop, target=24)
    for data, side in ((jpeg_file(noise(40, 50)), 40), (encoded(Image.fromarray(noise(40, 50))), 40)):
        found, crop = crops.picture(data, draw, 24)
        assert crop.box[2] - crop.box[0] == side
        assert np.array_equal(found, crops.cut(crops.decode(data), crop, 24))
    assert np.array_equal(crops.picture(encoded(Image.fromarray(noise(40, 50))), draw, 24, "fast")[0], found)


def test_a_picture_depends_on_seed_epoch_and_id_alone() -> None:
    data = jpeg_file(photographs.photograph(0, 0, 90, 80))

    def drawn(seed: int, epoch: int, name: str) -> tuple[crops.Pixels, CropBox]:
        return crops.picture(data, partial(crops.transformer_crop, target=48, scale_max=9 / 8, rng=generator(seed, "crop", epoch, name)), 48)

    picture, crop = drawn(1, 2, "a")
    again, same = drawn(1, 2, "a")
    assert crop == same and np.array_equal(picture, again)
    assert len({drawn(*key)[1] for key in ((1, 2, "a"), (1, 3, "a"), (2, 2, "a"), (1, 2, "b"))}) == 4


def decibels(a: crops.Pixels, b: crops.Pixels) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(np.float64) - b).mean(), 1e-9)))


def real_photograph(side: int) -> crops.Pixels:
    """A portrait that comes with matplotlib, at the size and sharpness of a photograph on the web."""
    whole = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB").crop((0, 0, 512, 512))
    return np.asarray(whole.resize((side, side), Image.Resampling.LANCZOS))


@pytest.mark.parametrize("quality", [75, 90, 95])
@pytest.mark.parametrize("resize", [256, 288])
def test_the_fast_option_is_45_decibels_from_the_exact_one_and_not_the_same(quality: int, resize: int) -> None:
    for pixels in (real_photograph(375), real_photograph(480), photographs.photograph(3, 1), photographs.photograph(3, 2, 640, 480)):
        data = photographs.encode(pixels, quality)
        exact, fast = (
            crops.picture(data, lambda size: replace(crops.center_crop(size, 256), resize=resize), 256, decoding)[0] for decoding in ("exact", "fast")
        )
        assert 45 <= decibels(exact, fast) < 70


def test_the_fast_option_is_exact_where_too_little_is_averaged() -> None:
    data = photographs.encode(real_photograph(300))
    exact, fast = (crops.picture(data, partial(crops.center_crop, target=256), 256, decoding)[0] for decoding in ("exact", "fast"))
    assert np.array_equal(exact, fast)


def test_generated_photographs_repeat_and_fall_off_as_photographs_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first = photographs.files(2, seed=5)
    assert first == photographs.files(2, seed=5) and first[0] != first[1], "the second call reads what the first kept"
    assert first[0] == photographs.encode(photographs.photograph(5, 0))
    assert len(list(tmp_path.glob("*/*"))) == 2
    grey = pillow(first[0]).mean(axis=2)
    power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    frequency = np.hypot(np.fft.fftfreq(375)[:, None], np.fft.fftfreq(500)[None])
    low, high = (power[(frequency > f) & (frequency < 1.2 * f)].mean() for f in (0.02, 0.2))
    assert 1.6 < np.log10(low / high) < 3.6, "amplitude over frequency to the power of 0.8 to 1.8"


def test_the_benchmark_of_images_measures_the_peers_that_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [photographs.encode(photographs.photograph(1, index)) for index in range(2)]
    options = rates.Options(device="cpu", seconds=0.01, runs=1)
    monkeypatch.setattr(data_images, "_CHUNK", 2)
    monkeypatch.setattr(data_images, "find_spec", lambda name: None)
    found = data_images.compare(files, options)
    harness.to_json(found)
    assert found.ratios["exact over torchvision"].value == found.measured[data_images._EXACT].value / found.peers[data_images._TORCHVISION].value
    assert set(found.floor) == {"decode at full size", "decode at an eighth of the size"}
    assert found.measured["fast, difference from exact"].min >= 45
    assert any("webdataset is not installed" in note for note in found.notes)
    assert "exact over webdataset" not in found.ratios
