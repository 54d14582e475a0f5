"""Decoding, AREA resizing and the paper's two augmentations."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.images import area_resize
from data_pipeline.images import crops as crops_module
from data_pipeline.images.crops import CropBox
from infra.errors import DataError
from tests.support import crops as drawn

_TOO_SMALL = r"40 x 15 pixels: crops of 16 .* raise data.min_side"


def encoded(picture: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, form)
    return out.getvalue()


def noise(height: int, width: int, seed: int = 0) -> crops_module.Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def literal_area(image: crops_module.Pixels, size: int) -> NDArray[np.float64]:
    """AREA with aligned corners as the definition says it, pixel by pixel and slowly; float64 [size, size, 3]."""
    height, width = image.shape[:2]
    scale_y = (height - 1) / (size - 1) if size > 1 else height
    scale_x = (width - 1) / (size - 1) if size > 1 else width
    out: NDArray[np.float64] = np.zeros((size, size, 3))
    for y in range(size):
        for x in range(size):
            for i in range(math.floor(y * scale_y), math.ceil((y + 1) * scale_y)):
                for j in range(math.floor(x * scale_x), math.ceil((x + 1) * scale_x)):
                    covered_y = min(i + 1, (y + 1) * scale_y) - max(i, y * scale_y)
                    covered_x = min(j + 1, (x + 1) * scale_x) - max(j, x * scale_x)
                    out[y, x] += covered_y * covered_x * image[min(i, height - 1), min(j, width - 1)]
    out /= scale_y * scale_x
    return out


def near_a_tie(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(values - np.floor(values) - 0.5) < 1e-3


def dense(size_in: int, size_out: int) -> NDArray[np.float64]:
    """The matrix of an axis, float64 [size_out, size_in]."""
    first, weights = area_resize.taps(size_in, size_out)
    out = np.zeros((size_out, size_in))
    for row, (start, some) in enumerate(zip(first, weights, strict=True)):
        out[row, start : start + len(some)] += some
    return out


@settings(deadline=None)  # the first example compiles
@given(st.integers(1, 20), st.integers(0, 15), st.integers(0, 10))
def test_area_resize_equals_the_literal_definition_but_for_ties(size: int, more: int, seed: int) -> None:
    image = noise(size + more, size + more, seed)
    slow = literal_area(image, size)
    fast = area_resize.resize(image, (0, 0, size + more, size + more), size, (0, 0), size)
    assert (near_a_tie(slow) | (fast == np.rint(slow))).all()
    assert np.abs(fast - slow).max() < 0.502


@pytest.mark.parametrize("side", [256, 257, 300, 375, 511, 512, 600, 1023])
def test_a_cut_at_256_pixels_equals_the_definition_but_for_ties(side: int) -> None:
    image = noise(side + 9, side + 30, side)
    crop = CropBox((13, 5, 13 + side, 5 + side), resize=min(side, 271), offset=(min(side, 271) - 256, 0))
    rows = dense(side, crop.resize)
    slow = np.einsum("yi,ijc,xj->yxc", rows, image[5 : 5 + side, 13 : 13 + side].astype(np.float64), rows, optimize=True)
    slow = slow[:256, crop.offset[0] : crop.offset[0] + 256]
    fast = crops_module.cut(image, crop, 256)
    wrong = fast != np.rint(slow)
    assert not (wrong & ~near_a_tie(slow)).any()
    assert wrong.mean() < 1e-3


def test_halves_are_rounded_to_even_as_tensorflow_rounds() -> None:
    image = np.zeros((5, 5, 3), np.uint8)
    image[:, ::2] = 1  # the scale is 2: every pair of columns averages to a half
    image[:, 2:] += 1
    assert area_resize.resize(image, (0, 0, 5, 5), 3, (0, 0), 3)[0].tolist() == [[0] * 3, [2] * 3, [2] * 3]


def test_a_cut_equals_the_literal_resize_rounded_cropped_and_flipped() -> None:
    image = noise(40, 31)
    slow = np.rint(literal_area(image[5:36], 20))[2:18, 3:19]
    for flip in (False, True):
        fast = crops_module.cut(image, CropBox((0, 5, 31, 36), resize=20, offset=(3, 2), flip=flip), 16)
        difference = np.abs((fast[:, ::-1] if flip else fast).astype(int) - slow)
        assert difference.max() <= 1, "further off than a tie in rounding"
        assert (difference > 0).mean() < 0.01


def test_an_image_that_is_a_view_or_read_only_is_cut_alike() -> None:
    image = noise(60, 50)
    crop = CropBox((0, 0, 25, 25), resize=18, offset=(1, 1))
    expected = crops_module.cut(np.ascontiguousarray(image[::2, ::2]), crop, 16)
    frozen = np.ascontiguousarray(image[::2, ::2])
    frozen.setflags(write=False)
    assert np.array_equal(crops_module.cut(image[::2, ::2], crop, 16), expected)
    assert np.array_equal(crops_module.cut(frozen, crop, 16), expected)


def test_threads_may_cut_at_once() -> None:
    image = noise(300, 300)
    crop = CropBox((0, 0, 300, 300), resize=200, offset=(5, 9))
    expected = crops_module.cut(image, crop, 190)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: crops_module.cut(image, crop, 190), range(40)):
            assert np.array_equal(found, expected)


def test_a_machine_that_can_keep_no_compiled_code_compiles_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real, tried = numba.njit, []

    def njit(*args: Any, cache: bool = False, **options: Any) -> Any:
        tried.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'loops': no locator available for file 'area.py'")
        return real(*args, **options)

    monkeypatch.setattr(numba, "njit", njit)
    kernel = area_resize._compiled.__wrapped__(3)
    assert tried == [True, False] and callable(kernel)
    assert vars(numba.config)["SLP_VECTORIZE"] == 0, "a setting of other users of numba stays theirs"

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("another reason")

    monkeypatch.setattr(numba, "njit", broken)
    with pytest.raises(RuntimeError, match="another reason"):
        area_resize._compiled.__wrapped__(3)


def test_the_last_pixels_of_an_area_resize_lean_on_the_edge() -> None:
    # The scale is (in - 1) / (out - 1) = 3: the second pixel covers [3, 6], of which only [3, 4] exists.
    assert dense(4, 2).tolist() == [[pytest.approx(1 / 3)] * 3 + [0.0], [0.0, 0.0, 0.0, pytest.approx(1.0)]]


@given(st.integers(1, 64), st.integers(0, 64))
def test_area_weights_sum_to_one_and_equal_sizes_change_nothing(size: int, more: int) -> None:
    first, weights = area_resize.taps(size + more, size)
    assert np.allclose(weights.sum(axis=1), 1, atol=1e-6)
    assert (weights >= 0).all()
    assert (first >= 0).all() and (first + weights.shape[1] <= size + more).all()
    assert np.array_equal(dense(size, size), np.eye(size))


def test_area_weights_refuse_to_enlarge() -> None:
    with pytest.raises(ValueError, match="from 3 to 5 pixels: expected 0 < output <= input"):
        area_resize.taps(3, 5)


@pytest.mark.parametrize("box", [(0, 0, 11, 11), (-1, 0, 5, 6), (0, 0, 5, 6), (4, 4, 4, 4)])
def test_a_box_outside_the_image_or_not_square_is_refused(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"of an image of 12 x 10 pixels: expected a square inside it"):
        area_resize.resize(noise(10, 12), box, 3, (0, 0), 2)


@pytest.mark.parametrize("offset", [(-1, 0), (0, 2), (2, 0)])
def test_a_part_outside_the_resized_square_is_refused(offset: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"part of 4 pixels at .* of a square resized to 5: expected it to lie inside"):
        area_resize.resize(noise(10, 12), (0, 0, 9, 9), 5, offset, 4)


@given(st.integers(16, 80), st.integers(16, 80), st.integers(0, 1000))
def test_listing_1_stays_in_the_ranges_of_the_paper(width: int, height: int, seed: int) -> None:
    crop = crops_module.dvae_crop((width, height), 16, 9 / 8, 12 / 8, np.random.default_rng(seed))
    left, top, right, bottom = crop.box
    side = min(width, height)
    assert right - left == bottom - top == side
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
    assert min(side, 18) <= crop.resize <= min(side, 24)
    assert all(0 <= offset <= crop.resize - 16 for offset in crop.offset)


def test_listing_1_reaches_every_value_of_its_ranges() -> None:
    crops = [crops_module.dvae_crop((30, 26), 16, 9 / 8, 12 / 8, np.random.default_rng(seed)) for seed in range(800)]
    assert {crop.box[0] for crop in crops} == set(range(5))
    assert {crop.resize for crop in crops} == set(range(18, 25))
    assert {crop.offset[0] for crop in crops} == set(range(9)) == {crop.offset[1] for crop in crops}
    assert {crop.flip for crop in crops} == {True, False}


@given(st.integers(16, 300), st.integers(16, 300), st.integers(0, 1000))
def test_listing_2_stays_in_the_middle_quarter_and_never_flips(width: int, height: int, seed: int) -> None:
    crop = crops_module.transformer_crop((width, height), 16, 9 / 8, np.random.default_rng(seed))
    side = min(width, height)
    for start, length in zip(crop.box[:2], (width, height), strict=True):
        slack = length - side
        assert 3 * slack // 8 <= start < max(3 * slack // 8 + 1, 5 * slack // 8)
    assert 16 <= crop.resize <= min(side, 18)
    assert not crop.flip


@pytest.mark.parametrize(("slack", "lowest", "highest"), [(100, 37, 61), (256, 96, 159), (1, 0, 0), (0, 0, 0)])
def test_listing_2_offsets_reach_both_ends_of_the_papers_examples(slack: int, lowest: int, highest: int) -> None:
    starts = {crops_module.transformer_crop((256 + slack, 256), 256, 9 / 8, np.random.default_rng(seed)).box[0] for seed in range(700)}
    assert (min(starts), max(starts)) == (lowest, highest)


def test_a_crop_is_made_again_from_its_json() -> None:
    image = noise(50, 37)
    for seed in range(20):
        picture, crop = drawn.listing1(image, 16, 9 / 8, 12 / 8, np.random.default_rng(seed))
        again = CropBox.from_json(crop.to_json())
        assert again == crop
        assert np.array_equal(crops_module.cut(image, again, 16), picture)
        assert picture.shape == (16, 16, 3) and picture.dtype == np.uint8


def test_a_flip_mirrors_left_and_right_only() -> None:
    image = noise(20, 20)
    plain, flipped = (crops_module.cut(image, CropBox((0, 0, 20, 20), 20, (0, 0), flip), 20) for flip in (False, True))
    assert np.array_equal(plain, image)
    assert np.array_equal(flipped, image[:, ::-1])


def test_the_central_view_is_the_middle_and_needs_no_generator() -> None:
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 200
    picture, crop = drawn.center(image, 8)
    assert crop.box == (16, 0, 32, 16)
    assert (picture == 200).all()
    picture2, _ = drawn.listing2(image, 16, 1.0, np.random.default_rng(0))
    assert picture2.shape == (16, 16, 3)


def test_an_image_smaller_than_the_crop_is_refused_by_all_three_views() -> None:
    rng = np.random.default_rng(0)
    small = noise(15, 40)
    with pytest.raises(DataError, match=_TOO_SMALL):
        drawn.center(small, 16)
    with pytest.raises(DataError, match=_TOO_SMALL):
        drawn.listing1(small, 16, 9 / 8, 12 / 8, rng)
    with pytest.raises(DataError, match=_TOO_SMALL):
        drawn.listing2(small, 16, 9 / 8, rng)


def test_transparency_is_laid_onto_white() -> None:
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    half.putpixel((0, 0), (255, 0, 0, 255))
    pixels = crops_module.decode(encoded(half))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[3, 3].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=1)
    assert (crops_module.decode(out.getvalue()) == 255).all()


@pytest.mark.parametrize(("mode", "form"), [("L", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("I;16", "PNG")])
def test_every_mode_becomes_three_bytes_a_pixel(mode: str, form: str) -> None:
    pixels = crops_module.decode(encoded(Image.new(mode, (6, 5)), form))
    assert pixels.shape == (5, 6, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("data", [b"", b"not an image", encoded(Image.new("RGB", (64, 64)))[:60]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"cannot be decoded .* replace the file or leave it out"):
        crops_module.decode(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (1000, 1000)))
    monkeypatch.setattr(crops_module, "MAX_PIXELS", 999_999)
    with pytest.raises(DataError, match=r"1000 x 1000 pixels: at most 999,999"):
        crops_module.decode(bomb)
