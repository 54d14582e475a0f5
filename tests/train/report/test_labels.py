"""Labels of grids show every script, or say which character they cannot show."""

import numpy as np
import pytest

from train.report.images import LABEL_SIZE, Pixels, font, grid, legible, wide_font


def test_plain_english_keeps_the_usual_font() -> None:
    assert legible("a red fox") == ("a red fox", font(LABEL_SIZE))


@pytest.mark.parametrize("text", ["naïve café", "красная лиса", "αλεπού", "ثعلب أحمر", "שועל"])
def test_other_scripts_come_in_a_font_that_has_them(text: str) -> None:
    assert wide_font(LABEL_SIZE) is not None, "matplotlib brings it"
    assert legible(text) == (text, wide_font(LABEL_SIZE))


def test_what_no_font_has_is_escaped_and_so_is_what_cannot_be_seen() -> None:
    assert legible("fox 狐")[0] == "fox \\u72d0"
    assert legible("a\0b\nc")[0] == "a\\x00b\\nc"


def test_a_grid_takes_any_label() -> None:
    tile: Pixels = np.zeros((20, 200, 3), np.uint8)
    blank, labelled = (grid([[tile]], labels=[text]) for text in ("", "狐" * 100_000))
    assert blank.shape == labelled.shape and (blank != labelled).any()
