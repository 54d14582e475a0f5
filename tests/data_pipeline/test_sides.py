"""Words of captions that let nobody mirror a picture."""

from __future__ import annotations

import pytest

from data_pipeline.sides import WORDS, names_a_side, words
from infra.errors import ConfigError
from train.config import EncodeSection, load_run

ALL = words((), ())


@pytest.mark.parametrize(
    ("caption", "names"),
    [
        ("a fox looks to the LEFT", True),
        ("left-facing fist", True),
        ("rightwards hand", True),
        ("a bright light", False),
        ("ten o\u2019clock", True),
        ("a red fox in the snow", False),
        ("a cleft rock", False),
        ("der Fuchs steht links", True),
        ("ein roter Fuchs im Schnee", False),
        ("un renard \u00e0 gauche", True),
        ("PANNEAU \u00c9CRIT", True),
        ("pannea e\u0301crit", True),
        ("un zorro a la izquierda", True),
        ("\u043b\u0438\u0441\u0430 \u0441\u043b\u0435\u0432\u0430", True),
        ("\u5de6\u8fb9\u7684\u72d0\u72f8", True),
        ("\u7ea2\u8272\u7684\u72d0\u72f8", False),
        ("", False),
    ],
)
def test_a_caption_names_a_side_by_whole_words_of_any_language(caption: str, names: bool) -> None:
    assert names_a_side([caption], ALL) == names
    assert names_a_side(["a red fox", caption], ALL) == names, "one caption is enough"


def test_languages_and_words_are_chosen() -> None:
    assert not names_a_side(["der Fuchs steht links"], words(("en",), ())) and names_a_side(["der Fuchs steht links"], words(("de", "en"), ()))
    assert names_a_side(["ein Pfeil"], words(("en",), ("pfeil*",))) and names_a_side(["Pfeile"], words(("en",), ("Pfeil*",)))
    assert not names_a_side(["Pfeile"], words(("en",), ("pfeil",))) and names_a_side(["der Giftpfeil"], words(("en",), ("*pfeil",)))
    assert not names_a_side(["a.b"], words(("en",), ("a+b",))), "letters stand for themselves"
    assert words(("en",), ("left*", "x")) == tuple(sorted({*WORDS["en"], "x"})) and set(ALL) == {word for each in WORDS.values() for word in each}


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"mirror_languages names 'tlh', for which there are no words; there are for de, en, .*: give its words in mirror_words"
    ):
        load_run("tiny", ['encode.mirror_languages=["tlh"]'])
    with pytest.raises(ConfigError, match=r"mirror_words holds '\*', which has no letters"):
        load_run("tiny", ['encode.mirror_words=["*"]'])
    with pytest.raises(ConfigError, match="mirror = true with crops = 1: each picture would still be seen one way only; set crops = 2 or more"):
        load_run("tiny", ["encode.mirror=true", "encode.crops=1"])
    assert not EncodeSection().mirror and load_run("tiny", ["encode.mirror=true", "encode.crops=2"]).encode.unmirrored() == ALL
