"""Identifies the language of a caption. Only this module imports the identifier, CLD2 (pycld2, whose wheel contains the model: nothing is downloaded)."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

import pycld2

from infra.errors import ConfigError

MIN_WORDS = 4
"""Captions with fewer words are too short to judge by their words; only their script counts."""

_BEST_EFFORT_WORDS = 6  # for captions with at least this many words CLD2's best guess is used even if it is unsure
_MAX_CHARACTERS = 2000  # enough to identify a language, and it bounds the time for any caption
_ENGLISH = ("en",)
_ALIKE = {
    "en": {"sco"},
    "no": {"nb", "nn"},
    "zh": {"zh-Hant"},
    "he": {"iw"},
    "iw": {"he"},
    "id": {"ms"},
    "ms": {"id"},
    "hr": {"sr", "bs"},
    "sr": {"hr", "bs"},
    "bs": {"hr", "sr"},
}
"""Other languages for which CLD2 mistakes captions of a language: some plain English for Scots, for example."""
_SCRIPTS = {
    "CYRILLIC": ("ru", "uk", "be", "bg", "mk", "sr", "kk", "ky", "mn", "tg", "tt", "uz", "ba"),
    "ARABIC": ("ar", "fa", "ur", "ps", "sd", "ug", "ku"),
    "DEVANAGARI": ("hi", "mr", "ne", "sa", "bh"),
    "CJK": ("zh", "ja", "ko"),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "KATAKANA-HIRAGANA": ("ja",),
    "HANGUL": ("ko",),
    "GREEK": ("el",),
    "HEBREW": ("he", "iw", "yi"),
    "THAI": ("th",),
    "BENGALI": ("bn", "as"),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "KANNADA": ("kn",),
    "MALAYALAM": ("ml",),
    "GUJARATI": ("gu",),
    "GURMUKHI": ("pa",),
    "SINHALA": ("si",),
    "GEORGIAN": ("ka",),
    "ARMENIAN": ("hy",),
    "ETHIOPIC": ("am", "ti"),
    "KHMER": ("km",),
    "LAO": ("lo",),
    "MYANMAR": ("my",),
    "TIBETAN": ("bo", "dz"),
}
"""Script, as the first word of its letters' Unicode names -> languages written in it. Every other language counts as written in Latin letters."""
_OTHER_SCRIPTS = frozenset(language for languages in _SCRIPTS.values() for language in languages)
_ALSO_LATIN = frozenset(("sr", "uz", "ku", "kk"))
_LETTER = re.compile(r"[^\W\d_]")
_LATIN = re.compile(r"[A-Za-z\u00AA-\u024F\u1E00-\u1EFF\uFF21-\uFF5A]")
SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
"""Letters of scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese): two of them count as a word."""
_NOT_WORD = re.compile(r"[^\w\s'’-]")


def identifier() -> str:
    """Name and version of the identifier, because its judgements may change with them."""
    return f"pycld2 {version('pycld2')}"


def is_english(caption: str) -> bool:
    """``speaks`` for English."""
    return speaks(caption, _ENGLISH)


def speaks(caption: str, languages: tuple[str, ...]) -> bool:
    """Whether a caption may be in one of some languages.

    False if most letters belong to scripts of other languages, or if CLD2 identifies another language. Captions too short to judge by their words count as True.
    Any string is accepted; only its first 2,000 characters are looked at.

    Raises:
        ConfigError: CLD2 does not know one of the languages.
    """
    accepted = _accepted(languages)
    text = " ".join(_NOT_WORD.sub(" ", caption[:_MAX_CHARACTERS]).split())  # CLD2 refuses control characters, surrogates and non-characters
    letters = _LETTER.findall(text)
    if 2 * sum(_script(letter) in accepted.scripts for letter in letters) < len(letters):
        return False
    words = sum(max(1, len(SPACELESS.findall(word)) // 2) for word in text.split() if _LETTER.search(word) is not None)
    if words < MIN_WORDS:
        return True
    found = _language(text, accepted.codes, best_effort=False)
    if found == "un" and words >= _BEST_EFFORT_WORDS:
        found = _language(text, accepted.codes, best_effort=True)
    return found == "un" or found in accepted.codes


@dataclass(frozen=True)
class _Accepted:
    codes: frozenset[str]
    """CLD2's codes of the languages."""
    scripts: frozenset[str]
    """Their scripts, by the first words of their letters' Unicode names."""


@lru_cache(maxsize=8)
def _accepted(languages: tuple[str, ...]) -> _Accepted:
    known = {code for _, code in pycld2.LANGUAGES}
    unknown = [code for code in languages if code not in known]
    if unknown:
        raise ConfigError(f"filters.languages names {', '.join(unknown)}, which the identifier does not know; it knows {', '.join(sorted(known))}.")
    scripts = {script for script, used in _SCRIPTS.items() if set(used) & set(languages)}
    if set(languages) - _OTHER_SCRIPTS or set(languages) & _ALSO_LATIN:
        scripts.add("LATIN")
    return _Accepted(frozenset(languages) | {alike for code in languages for alike in _ALIKE.get(code, ())}, frozenset(scripts))


@lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, CJK. A full-width Latin letter counts as LATIN."""
    if _LATIN.match(letter):
        return "LATIN"
    return unicodedata.name(letter, "").partition(" ")[0]


def _language(text: str, accepted: frozenset[str], best_effort: bool) -> str:
    """The code of an accepted language if CLD2 finds one anywhere in the text, else that of the main language; 'un' if CLD2 is undecided."""
    _, _, details = pycld2.detect(text, isPlainText=True, bestEffort=best_effort)
    codes = [code for _, code, _, _ in details]
    return next((code for code in codes if code in accepted), codes[0])
