"""What is kept, what is dropped, and under which reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_pipeline.config import FilterConfig
from data_pipeline.filters import judge as judge_module
from data_pipeline.filters.captions import blocked_words, caption_reason
from data_pipeline.filters.judge import Accepted, Dropped, content_hash, fingerprint, judge, printable
from data_pipeline.filters.perceptual_hash import perceptual_hash
from data_pipeline.images import crops
from data_pipeline.images.files import load_file, open_file, to_grey
from data_pipeline.sources.pairs import Pair
from infra.errors import DataError
from tests.support.hostile import encode, picture, with_orientation

CAPTION = "a brown dog runs across the field"
OFF = FilterConfig(
    min_words=0,
    max_characters=0,
    broken_text=False,
    english=False,
    boilerplate=False,
    max_repetition=1.0,
    formats=("jpeg", "png", "webp", "gif", "bmp", "tiff"),
    refuse=(),
    max_aspect=0.0,
    max_image_bytes=0,
)
RNG = np.random.default_rng(0)
PHOTO = encode(picture(RNG), "JPEG")


def pair(image: bytes = PHOTO, *captions: str, **fields: Any) -> Pair:
    return Pair(**({"id": "1", "source": "s", "license": "l", "group": "g"} | fields), captions=captions or (CAPTION,), image=image)


def accepted(image: bytes = PHOTO, *captions: str, config: FilterConfig | None = None, min_side: int = 0) -> Accepted:
    found = judge(pair(image, *captions), config or FilterConfig(), min_side)
    assert isinstance(found, Accepted), found
    return found


def reason(image: bytes = PHOTO, *captions: str, config: FilterConfig | None = None, min_side: int = 0) -> str:
    found = judge(pair(image, *captions), config or FilterConfig(), min_side)
    assert isinstance(found, Dropped), found
    return found.reason


def test_what_utf8_cannot_write_is_dropped_whatever_is_switched_off() -> None:
    for half in ("\ud83d", "\udc00"):
        assert caption_reason(f"a dog {half} runs", OFF) == "broken text"
    found = judge(pair(PHOTO, group="g\udc00"), OFF, 0)
    assert isinstance(found, Dropped) and found.reason == "broken metadata" and found.example == "g\\udc00"


def test_blocked_words_are_whole_words_and_phrases_of_a_list(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# a comment\nClasp\n\nhot dog  # a phrase\n")
    config = FilterConfig(blocked_words=str(path))
    assert caption_reason("the CLASP of a bag", config) == "blocked word"
    assert caption_reason("he eats a Hot, dog today", config) == "blocked word"
    for caption in ("many clasps of a bag", "a hot brown dog runs", "a comment on this"):
        assert caption_reason(caption, config) is None
    before = fingerprint(config)
    path.write_text("clasp\n")
    blocked_words.cache_clear()
    assert fingerprint(config) != before, "another list judges anew"


def test_a_missing_list_of_blocked_words_is_an_error(tmp_path: Path) -> None:
    config = FilterConfig(blocked_words=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match=r"none\.txt"):
        judge(pair(), config, 0)
    with pytest.raises(DataError, match=r"none\.txt"):
        fingerprint(config)


def test_the_fingerprint_changes_with_every_setting() -> None:
    assert fingerprint(FilterConfig()) == fingerprint(FilterConfig())
    assert len({fingerprint(config) for config in (FilterConfig(), OFF, FilterConfig(min_words=4), FilterConfig(english=False))}) == 4


def test_failing_captions_go_and_the_record_goes_when_none_is_left() -> None:
    found = accepted(PHOTO, "IMG_1234.jpg", CAPTION, "dog", "cat", "a cat sits on a red sofa")
    assert found.pair.captions == (CAPTION, "a cat sits on a red sofa")
    assert found.dropped_captions == {"caption too short": 3}
    dropped = judge(pair(PHOTO, "photographed on 12 May 2013", "dog"), FilterConfig(), 0)
    assert dropped == Dropped("boilerplate", "photographed on 12 May 2013", judge_module.Counter({"boilerplate": 1, "caption too short": 1}))
    assert judge(Pair("1", (), PHOTO, "s", "l", "g"), FilterConfig(), 0) == Dropped("empty caption", "")


def test_captions_of_a_record_whose_image_goes_are_counted_too() -> None:
    found = judge(pair(b"", CAPTION, "dog"), FilterConfig(), 0)
    assert isinstance(found, Dropped) and found.reason == "undecodable image" and found.dropped_captions == {"caption too short": 1}


@pytest.mark.parametrize(
    ("size", "limit", "kept"), [((96, 48), 2.0, True), ((97, 48), 2.0, False), ((48, 97), 2.0, False), ((300, 20), 0.0, True), ((60, 60), 1.0, True)]
)
def test_the_aspect_ratio_lies_between_one_half_and_two(size: tuple[int, int], limit: float, kept: bool) -> None:
    found = judge(pair(encode(picture(RNG, *size))), FilterConfig(max_aspect=limit), 0)
    assert (
        isinstance(found, Accepted)
        if kept
        else (isinstance(found, Dropped) and found.reason == "aspect ratio" and found.example == f"{size[0]} x {size[1]} png")
    )


def test_small_images_go() -> None:
    assert reason(encode(picture(RNG, 64, 63)), min_side=64) == "image too small"
    assert accepted(encode(picture(RNG, 64, 64)), min_side=64).width == 64


def test_formats_can_be_limited_to_jpeg() -> None:
    only = FilterConfig(formats=("jpeg",))
    assert reason(encode(picture(RNG)), config=only) == "image format"
    accepted(PHOTO, config=only)
    assert reason(encode(picture(RNG), "TIFF")) == "image format"
    mpo = encode(picture(RNG), "MPO", save_all=True, append_images=[picture(RNG)])
    accepted(mpo, config=FilterConfig(formats=("jpeg",), refuse=("animated",)))


KINDS = {
    "animated": encode(picture(RNG, 64, 64, "P"), "GIF", save_all=True, append_images=[picture(RNG, 64, 64, "P")]),
    "cmyk": encode(picture(RNG, mode="CMYK"), "JPEG"),
    "16-bit": encode(Image.fromarray(np.arange(80 * 90, dtype=np.uint16).reshape(80, 90) * 9)),
    "palette": encode(picture(RNG, mode="P")),
    "greyscale": encode(picture(RNG, mode="L"), "JPEG"),
    "transparent": encode(Image.merge("RGBA", (*picture(RNG).split(), Image.linear_gradient("L").resize((96, 80))))),
    "rotated": with_orientation(picture(RNG), 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_image_is_refused_under_its_own_reason_or_converted(kind: str) -> None:
    assert reason(KINDS[kind], config=FilterConfig.model_validate({"refuse": (kind,)})) == f"{kind} image"
    others = tuple(other for other in KINDS if other != kind and (kind, other) not in (("animated", "palette"), ("16-bit", "greyscale")))
    found = accepted(KINDS[kind], config=FilterConfig.model_validate({"refuse": others}))
    pixels = crops.decode(KINDS[kind])
    assert pixels.shape == (found.height, found.width, 3) and pixels.std() > 20


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_animations_of_all_formats_are_seen(form: str) -> None:
    frames = [picture(RNG, 64, 64) for _ in range(2)]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    assert reason(data, config=OFF.model_copy(update={"refuse": ("animated",)})) == "animated image"
    assert np.abs(crops.decode(data).astype(int) - np.asarray(frames[0])).mean() < 12, "the first frame is shown"


def test_sixteen_bits_are_shown_by_their_upper_eight() -> None:
    levels = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    assert (crops.decode(encode(Image.fromarray(levels)))[:, :, 1] == levels >> 8).all()
    assert (crops.decode(encode(Image.fromarray(levels), "TIFF"))[:, :, 1] == levels >> 8).all()


def test_pixels_of_32_bits_are_undecodable() -> None:
    data = encode(Image.fromarray(RNG.random((64, 64), dtype=np.float32)), "TIFF")
    assert reason(data, config=OFF) == "undecodable image"
    with pytest.raises(DataError, match="mode 'F': its pixels are not colours of 8 or 16 bits"):
        crops.decode(data)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright_by_exif(form: str, turn: int) -> None:
    """Corner colours tell: the EXIF standard says where row 0 and column 0 are seen."""
    tall = Image.new("RGB", (40, 64), "white")
    tall.paste("red", (0, 0, 20, 32))  # row 0, column 0
    data = with_orientation(tall, turn, form)
    found = accepted(data, config=OFF)
    assert (found.width, found.height) == ((64, 40) if turn >= 5 else (40, 64))
    pixels = crops.decode(data)
    assert pixels.shape == (found.height, found.width, 3)
    top, left = turn in (1, 2, 5, 6), turn in (1, 4, 5, 8)
    corner = pixels[4 if top else -5, 4 if left else -5]
    assert corner[0] > 200 and corner[1] < 60, "red is where the standard says"


def test_large_images_are_converted_in_strips_with_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, data in KINDS.items():
        whole, grey = crops.decode(data), to_grey(load_file(open_file(data, 10**6)))
        with monkeypatch.context() as patch:
            patch.setattr("data_pipeline.images.files._STRIP_PIXELS", 1000)
            assert (crops.decode(data) == whole).all(), kind
            assert (to_grey(load_file(open_file(data, 10**6))) == grey).all(), kind


def test_bombs_have_their_own_reason() -> None:
    data = encode(Image.new("RGB", (100, 100)))
    assert reason(data, config=FilterConfig(max_pixels=9_999)) == "decompression bomb"
    accepted(data, config=FilterConfig(max_pixels=10_000))
    webp = encode(Image.new("RGB", (100, 100)), "WEBP", lossless=True)
    assert reason(webp, config=FilterConfig(max_pixels=19_999)) == "decompression bomb"
    accepted(webp, config=FilterConfig(max_pixels=20_000))


def test_images_within_the_limits_are_stored_as_found() -> None:
    assert accepted(PHOTO).image is PHOTO


def test_large_images_are_shrunk_to_a_side_but_not_below_the_smallest() -> None:
    found = accepted(encode(picture(RNG, 400, 300), "JPEG"), config=FilterConfig(max_side=200))
    assert (found.width, found.height) == (200, 150) == crops.decode(found.image).shape[1::-1] and found.image[:2] == b"\xff\xd8"
    assert found.pair.image is found.image
    found = accepted(encode(picture(RNG, 400, 300)), config=FilterConfig(max_side=100), min_side=90)
    assert (found.width, found.height) == (120, 90) and found.image[1:4] == b"PNG", "lossless stays lossless"
    found = accepted(with_orientation(picture(RNG, 400, 300), 6), config=FilterConfig(max_side=200))
    assert (found.width, found.height) == (150, 200), "what is encoded again is upright"


def test_large_files_are_shrunk_until_they_fit() -> None:
    noise = encode(Image.fromarray(RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8)), "JPEG", quality=98)
    found = accepted(noise, config=FilterConfig(max_image_bytes=9_000))
    assert len(found.image) <= 9_000 and found.width == found.height >= 60
    assert accepted(noise, config=FilterConfig(max_image_bytes=9_000), min_side=190).width == 190, "but training needs this side"
    small = encode(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG", quality=50)
    assert accepted(small, config=FilterConfig(max_image_bytes=100), min_side=64).image is small, "nor is a file made larger"
    assert accepted(noise, config=FilterConfig(max_image_bytes=0)).image is noise


def test_content_hashes_tell_files_and_captions_apart() -> None:
    one = content_hash(pair(PHOTO, "ab", "c"))
    assert one == content_hash(pair(PHOTO, "ab", "c", id="another")) and 0 <= one < 2**64
    others = [pair(PHOTO, "a", "bc"), pair(PHOTO, "abc"), pair(PHOTO, "c", "ab"), pair(PHOTO + b"\0", "ab", "c")]
    assert len({one, *map(content_hash, others)}) == 5
    shrunk = accepted(PHOTO, config=FilterConfig(max_side=50))
    assert shrunk.content_hash == accepted(PHOTO).content_hash, "of the file as found"


def distance(a: bytes, b: bytes) -> int:
    return (accepted(a, config=OFF).perceptual_hash ^ accepted(b, config=OFF).perceptual_hash).bit_count()


def test_perceptual_hashes_survive_encoding_scaling_and_brightness_and_tell_pictures_apart() -> None:
    rng = np.random.default_rng(1)
    apart = []
    for _ in range(12):
        image, other = picture(rng, 256, 192), picture(rng, 256, 192)
        original = encode(image)
        for copy in (
            encode(image, "JPEG", quality=40),
            encode(image, "WEBP"),
            encode(image.resize((180, 135))),
            encode(image.resize((1024, 768)), "JPEG"),
            encode(image.point(lambda value: round(0.92 * value))),
        ):
            assert distance(original, copy) <= FilterConfig().near_duplicate_bits
        apart.append(distance(original, encode(other)))
    assert min(apart) > 12
    assert accepted(original).perceptual_hash.bit_count() == 32, "the median halves them"


def test_flat_pictures_equal_nothing_but_themselves() -> None:
    flat = [encode(Image.new("RGB", (64, 64), (level, level, level))) for level in (0, 128, 129, 255)]
    hashes = [accepted(data).perceptual_hash for data in flat]
    assert len(set(hashes)) == 4 and min((a ^ b).bit_count() for a in hashes for b in hashes if a != b) > 8
    assert accepted(flat[0]).perceptual_hash == hashes[0]
    levels = np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    assert perceptual_hash(levels, b"a") == perceptual_hash(levels, b"b"), "pictures with structure do not depend on their file"


def test_examples_are_short_and_printable() -> None:
    assert printable("a\x00\ud800\u202e\nb") == "a\\x00\\ud800\\u202e b"
    line = printable("\U0001f415\0" * 10**6)
    assert len(line) == judge_module.EXAMPLE_LENGTH and line.isprintable() and line.endswith("…")


def test_settings_that_accept_nothing_are_refused() -> None:
    with pytest.raises(ValidationError, match="formats is empty"):
        FilterConfig(formats=())
    with pytest.raises(ValidationError, match=r"max_aspect = 0\.5: longer over shorter side, expected at least 1"):
        FilterConfig(max_aspect=0.5)
