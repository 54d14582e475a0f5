"""Filters of captions: pure functions that return the reason why a caption is dropped, or None. The cheapest run first, and any string is accepted.

``too_long`` runs before the filters that look at words, so that a caption of a megabyte costs little time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from data_pipeline.config import FilterConfig
from data_pipeline.filters.boilerplate import is_boilerplate
from data_pipeline.filters.language import SPACELESS, is_english, speaks
from infra import storage, text
from infra.errors import DataError, MissingError

_SURROGATE = re.compile(r"[\uD800-\uDFFF]")
_VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff]"
)
_BROKEN = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd-\uffff]"  # control characters except tab, line feed and carriage return; replacement characters
    r"|</?[A-Za-z][^<>]{0,500}>|<!--|&(?:[A-Za-z]{2,8}|#\d{1,7}|#[xX][0-9A-Fa-f]{1,6});"
)
_WORD = re.compile(r"\w+(?:['’]\w+)*")
_MIN_REPETITION_WORDS = 6
"""In shorter captions words repeat by chance ('the cat on the mat')."""
_MIN_CAPITALS_WORDS = 4
"""A shorter caption may be a name."""


def unstorable(caption: str, config: FilterConfig) -> str | None:
    """It contains a lone surrogate, which cannot be encoded as UTF-8. Always on."""
    return "broken text" if _SURROGATE.search(caption) else None


def empty(caption: str, config: FilterConfig) -> str | None:
    """No visible character. Always on."""
    return None if _VISIBLE.search(caption) else "empty caption"


def too_long(caption: str, config: FilterConfig) -> str | None:
    """More characters than ``max_characters``."""
    return "caption too long" if 0 < config.max_characters < len(caption) else None


def broken(caption: str, config: FilterConfig) -> str | None:
    """Control characters, U+FFFD, HTML tags or entities: signs of an earlier error in processing."""
    return "broken text" if config.broken_text and _BROKEN.search(caption) else None


def too_short(caption: str, config: FilterConfig) -> str | None:
    """Fewer words than ``min_words``. A word is anything between spaces that contains a letter or a digit; in scripts without spaces, two letters are a word."""
    if config.min_words == 0:
        return None
    words = sum(max(1, len(SPACELESS.findall(word)) // 2) for word in caption.split() if any(map(str.isalnum, word)))
    return "caption too short" if words < config.min_words else None


def boilerplate(caption: str, config: FilterConfig) -> str | None:
    """Mostly dates, file names, camera defaults or stock phrases."""
    return "boilerplate" if config.boilerplate and is_boilerplate(caption) else None


def repetitive(caption: str, config: FilterConfig) -> str | None:
    """Too many words that occurred before (Sharma et al.: rate of token repetition)."""
    if config.max_repetition == 1:
        return None
    words = _WORD.findall(caption.lower())
    if len(words) < _MIN_REPETITION_WORDS:
        return None
    return "repetitive caption" if len(words) - len(set(words)) > config.max_repetition * len(words) else None


def capitalised(caption: str, config: FilterConfig) -> str | None:
    """Too many words with a capital first letter (Sharma et al.)."""
    if config.max_capitals == 1:
        return None
    words = [word for word in _WORD.findall(caption) if word[0].isalpha()]
    if len(words) < _MIN_CAPITALS_WORDS:
        return None
    return "capitalised caption" if sum(word[0].isupper() for word in words) > config.max_capitals * len(words) else None


def blocked(caption: str, config: FilterConfig) -> str | None:
    """It contains a word or phrase of the list ``blocked_words``, as whole words and in any case."""
    if not config.blocked_words:
        return None
    words, phrases = blocked_words(config.blocked_words)
    found = _WORD.findall(caption.casefold())
    if not words.isdisjoint(found):
        return "blocked word"
    joined = f" {' '.join(found)} " if phrases else ""
    return "blocked word" if any(phrase in joined for phrase in phrases) else None


def foreign(caption: str, config: FilterConfig) -> str | None:
    """Identified as another language than those of ``languages``, or than English."""
    if config.languages:
        return None if speaks(caption, config.languages) else "another language"
    return "not English" if config.english and not is_english(caption) else None


CAPTION_FILTERS: tuple[Callable[[str, FilterConfig], str | None], ...] = (
    empty,
    too_long,
    unstorable,
    broken,
    too_short,
    repetitive,
    capitalised,
    blocked,
    boilerplate,
    foreign,
)


def caption_reason(caption: str, config: FilterConfig) -> str | None:
    """The first reason to drop a caption, or None."""
    for check in CAPTION_FILTERS:
        reason = check(caption, config)
        if reason is not None:
            return reason
    return None


@lru_cache(maxsize=4)
def blocked_words(url: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """The single words of a list, and its phrases as ' word word '. The file has one entry a line and '#' before comments; it is read once in a process.

    Raises:
        DataError: the list is missing or not UTF-8 text.
    """
    try:
        listed = storage.read_text(url)
    except MissingError as error:
        raise DataError(
            f"filters.blocked_words = {url}: does not exist; name a text file with a word or phrase on each line, or leave it empty."
        ) from error
    lines = (_WORD.findall(line.partition("#")[0].casefold()) for line in text.lines(listed))
    entries = [words for words in lines if words]
    return frozenset(words[0] for words in entries if len(words) == 1), tuple(f" {' '.join(words)} " for words in entries if len(words) > 1)
