"""Text in pictures: finds a font on this machine that has every character of a text, and escapes characters that no font has."""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont, features

LABEL_SIZE = 12
"""Font size of labels, in pixels."""
_MOST_LETTERS = 2000
"""Most characters of a label that are considered, before it is cut to its width."""
_NO_CHARACTER = "\U0010ffff"  # in no font, so a font draws its glyph for missing characters
_ESCAPES = "\\0123456789abcdefuUx"
_SHAPED = re.compile("[\u0590-\u0dff\u1000-\u109f\u1780-\u17ff\ufb1d-\ufdff\ufe70-\ufeff]")
"""Characters of scripts that run from right to left, or whose letters change with their neighbours: Hebrew, Arabic, Indian scripts, Burmese, Khmer."""

Face = ImageFont.FreeTypeFont | ImageFont.ImageFont


@lru_cache(maxsize=8)
def font(size: int = LABEL_SIZE) -> Face:
    """The default font of labels."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=8)
def wide_font(size: int = LABEL_SIZE) -> Face | None:
    """A font with more scripts (Greek, Cyrillic, Arabic, Hebrew, ...), which comes with matplotlib; None if matplotlib is not installed."""
    found = importlib.util.find_spec("matplotlib")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return None


def legible(text: str, size: int = LABEL_SIZE) -> tuple[str, Face]:
    """A text and a font that has all of its characters. Characters that no font here has, or that cannot be set without raqm and fribidi, are escaped (\\u4e2d)."""
    text = text[:_MOST_LETTERS]
    plain = "".join(character if character.isprintable() and _can_be_set(character) else _escaped(character) for character in text)
    faces = [face for face in (font(size), wide_font(size)) if face is not None]
    for face in faces:
        if all(_has(face, character) for character in set(plain)):
            return plain, face
    lacked = frozenset(character for character in plain if not _has(faces[-1], character))
    best, shown = faces[-1], frozenset[str]()
    for path in _of_machine(lacked):
        face = ImageFont.truetype(path, size)
        has = frozenset(character for character in {*plain, *_ESCAPES} if character.isspace() or _has(face, character))
        needed = set(plain) - lacked | (set() if lacked <= has else set(_ESCAPES))
        if len(has & lacked) > len(shown) and needed <= has:
            best, shown = face, has & lacked
        if shown == lacked:
            break
    return "".join(character if character.isspace() or _has(best, character) else _escaped(character) for character in plain), best


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    """Files of this machine's fonts, upright sans-serif ones first. Empty without matplotlib, which finds them."""
    if importlib.util.find_spec("matplotlib") is None:
        return ()
    from matplotlib.font_manager import findSystemFonts

    def order(path: str) -> tuple[bool, bool, str]:
        name = Path(path).name.lower()
        return "sans" not in name, not any(word in name for word in ("regular", "book", ".ttc")), path

    return tuple(sorted(findSystemFonts(), key=order))


@lru_cache(maxsize=256)
def _of_machine(lacked: frozenset[str]) -> tuple[str, ...]:
    """Files of this machine's fonts that have at least one of some characters."""
    found = []
    for path in _system_fonts():
        try:
            face = ImageFont.truetype(path, LABEL_SIZE)
        except OSError:  # a bitmap font, or a damaged one
            continue
        if any(_has(face, character) for character in lacked):
            found.append(path)
    return tuple(found)


def _can_be_set(character: str) -> bool:
    return (features.check("raqm") and features.check("fribidi")) or not _SHAPED.match(character)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _has(face: Face, character: str) -> bool:
    """Whether a font has a character. Uses the basic layout, because the full one draws a dotted circle for a combining mark that stands alone."""
    path = getattr(face, "path", None)
    if isinstance(path, str):
        face = _simple(path)
    elif character.isascii() or unicodedata.category(character).startswith("M"):
        return character.isascii()  # the default font is Latin
    return bytes(face.getmask(character)) != bytes(face.getmask(_NO_CHARACTER))


@lru_cache(maxsize=64)
def _simple(path: str) -> Face:
    return ImageFont.truetype(path, LABEL_SIZE, layout_engine=ImageFont.Layout.BASIC)


def fit(text: str, width: int, size: int = LABEL_SIZE, face: Face | None = None) -> str:
    """Text cut to ``width`` pixels; text that was cut ends in an ellipsis."""
    face = face or font(size)
    if face.getlength(text) <= width:
        return text
    low, high = 0, len(text)  # bisection for the most characters that fit, because a caption may have a million
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if face.getlength(text[:middle] + "…") <= width else (low, middle - 1)
    return text[:low] + "…"


def wrap(text: str, width: int, lines: int, face: Face | None = None) -> list[str]:
    """Text broken into at most ``lines`` lines of ``width`` pixels; text that does not fit ends in an ellipsis."""
    face = face or font(LABEL_SIZE - 1)
    out: list[str] = []
    words = text.split()
    while words and len(out) < lines:
        line = words.pop(0)
        while words and face.getlength(f"{line} {words[0]}") <= width:
            line += " " + words.pop(0)
        if words and len(out) == lines - 1:
            line += " " + " ".join(words)
        out.append(fit(line, width, face=face))
    return out
