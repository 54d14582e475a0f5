"""Labels of grids show every script, or say which character they cannot show."""

from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import features

from train.report import labels
from train.report.contact_sheet import contact_sheet
from train.report.images import Pixels, grid
from train.report.labels import LABEL_SIZE, font, legible, wide_font


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fonts of this machine: none, to which a test adds its own."""
    paths: list[str] = []
    monkeypatch.setattr(labels, "_system_fonts", lambda: tuple(paths))
    labels._of_machine.cache_clear()
    return paths


def made_font(path: Path, letters: str) -> str:
    """A font with a box of another width for each letter."""
    names = [".notdef", *(f"u{ord(letter):05X}" for letter in letters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    glyphs = {}
    for number, name in enumerate(names):
        pen, width = TTGlyphPen(None), 100 + 40 * number
        for place, corner in enumerate(((50, 0), (50, 700), (width, 700), (width, 0))):
            (pen.lineTo if place else pen.moveTo)(corner)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 50) for name in names})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Made", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def test_plain_english_keeps_the_usual_font() -> None:
    assert legible("a red fox") == ("a red fox", font(LABEL_SIZE))


@pytest.mark.parametrize("text", ["naïve café", "красная лиса", "αλεπού", "ثعلب أحمر", "שועל"])
def test_other_scripts_come_in_a_font_that_has_them(text: str) -> None:
    assert wide_font(LABEL_SIZE) is not None, "matplotlib brings it"
    assert legible(text) == (text, wide_font(LABEL_SIZE))


def test_chinese_and_hindi_come_in_a_font_of_this_machine(machine: list[str], tmp_path: Path) -> None:
    machine += [made_font(tmp_path / "damaged.ttf", "a"), made_font(tmp_path / "han.ttf", "red 苹果"), made_font(tmp_path / "hindi.ttf", "सेब ")]
    (tmp_path / "damaged.ttf").write_bytes(b"no font")
    for text, name in (("red 苹果", "han.ttf"), ("सेब", "hindi.ttf")):
        found, face = legible(text)
        assert (found, Path(str(face.path)).name) == (text, name)  # type: ignore[union-attr]
    assert legible("苹果 狐")[0] == "\\u82f9\\u679c \\u72d0", "a font without the letters of escapes does not do"
    machine.append(made_font(tmp_path / "more.ttf", "苹果 \\0123456789abcdefuUx"))
    labels._of_machine.cache_clear()
    assert legible("苹果 狐")[0] == "苹果 \\u72d0", "what the best of them lacks is escaped"
    tile: Pixels = np.zeros((20, 200, 3), np.uint8)
    assert (grid([[tile]], labels=["苹果"]) != grid([[tile]], labels=["果苹"])).any(), "letters, and no boxes that are all alike"
    assert (contact_sheet([tile], ["苹果"]) != contact_sheet([tile], ["果苹"])).any(), "in the sheet of inspect as well"


def test_letters_that_cannot_be_joined_here_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "raqm")
    assert legible("ثعلب red")[0] == "\\u062b\\u0639\\u0644\\u0628 red" and legible("лиса")[0] == "лиса"


def test_what_no_font_has_is_escaped_and_so_is_what_cannot_be_seen(machine: list[str]) -> None:
    assert legible("fox 狐")[0] == "fox \\u72d0" and legible("लाल")[0] == "\\u0932\\u093e\\u0932", "also signs that stand on letters"
    assert legible("a\0b\nc")[0] == "a\\x00b\\nc"


def test_a_grid_takes_any_label() -> None:
    tile: Pixels = np.zeros((20, 200, 3), np.uint8)
    blank, labelled = (grid([[tile]], labels=[text]) for text in ("", "狐" * 100_000))
    assert blank.shape == labelled.shape and (blank != labelled).any()
