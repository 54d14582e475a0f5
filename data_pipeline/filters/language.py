"""Is a caption English? The home of the language identifier, CLD2 (pycld2: the model is in the wheel, nothing is fetched)."""

from __future__ import annotations

import re
from importlib.metadata import version

import pycld2

MIN_WORDS = 4
"""Captions with fewer words are too short to judge by their words; only their script counts."""

_BEST_EFFORT_WORDS = 6  # from here on CLD2's guess is worth having where it is not sure
_MAX_CHARACTERS = 2000  # enough to tell a language, and a bound on the time of any caption
_ENGLISH = {"en", "sco", "un"}  # Scots is what CLD2 calls some plain English; 'un' is undecided
_LETTER = re.compile(r"[^\W\d_]")
_LATIN = re.compile(r"[A-Za-z\u00AA-\u024F\u1E00-\u1EFF\uFF21-\uFF5A]")
_NOT_WORD = re.compile(r"[^\w\s'’-]")


def identifier() -> str:
    """Name and version of the identifier: what it accepts may change with it."""
    return f"pycld2 {version('pycld2')}"


def is_english(caption: str) -> bool:
    """False where most letters are not Latin, or where CLD2 finds another language; captions that are too short to judge are kept.

    Any string is accepted. The judgement is made on the first 2,000 characters.
    """
    text = " ".join(_NOT_WORD.sub(" ", caption[:_MAX_CHARACTERS]).split())  # CLD2 refuses control characters, surrogates and non-characters
    letters = len(_LETTER.findall(text))
    if 2 * len(_LATIN.findall(text)) < letters:
        return False
    words = sum(_LETTER.search(word) is not None for word in text.split())
    if words < MIN_WORDS:
        return True
    found = _language(text, best_effort=False)
    if found == "un" and words >= _BEST_EFFORT_WORDS:
        found = _language(text, best_effort=True)
    return found in _ENGLISH


def _language(text: str, best_effort: bool) -> str:
    """ISO 639 code of the main language, 'un' if undecided, 'en' if English has any part in the text."""
    _, _, details = pycld2.detect(text, isPlainText=True, bestEffort=best_effort)
    codes = [code for _, code, _, _ in details]
    return "en" if "en" in codes else codes[0]
