"""Which characters of a caption count as letters (tokenizer.letters). Captions are split into runs of letters before byte-pair merges are applied."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from typing import Literal

Letters = Literal["a-z", "unicode"]
A_TO_Z = "abcdefghijklmnopqrstuvwxyz"


@cache
def split(letters: Letters) -> re.Pattern[str]:
    """A pattern whose matches are the runs of letters in a normalised caption, and every other character by itself."""
    if letters == "a-z":
        return re.compile(r"[a-z]+|[^a-z]", re.DOTALL)
    # Letters and marks (the vowel signs of Indian scripts, the points of Arabic and Hebrew). The module re has no class for either.
    numbers = [number for number in range(sys.maxunicode + 1) if unicodedata.category(chr(number))[0] in "LM"]
    spans = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in _spans(numbers))
    return re.compile(rf"[{spans}]+|.", re.DOTALL)


def _spans(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Sorted numbers, grouped into (first, last) of each run of consecutive ones."""
    for _, several in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in several]
        yield run[0], run[-1]


def is_run(word: str, letters: Letters) -> bool:
    """Whether a word of ``split`` is a run of letters."""
    return word[0] in A_TO_Z if letters == "a-z" else unicodedata.category(word[0])[0] in "LM"


def common_runs(runs: Mapping[str, int], room: int) -> Mapping[str, int]:
    """Keep only the ``room`` most frequent letters: runs are cut at all others, which are spelled as bytes (Chinese has thousands of letters).

    Args:
        runs: run of letters -> its count.
        room: number of letters to keep.
    """
    found: Counter[str] = Counter()
    for word, count in runs.items():
        for letter in word:
            found[letter] += count
    kept = set(sorted(found, key=lambda letter: (-found[letter], letter))[: max(1, room)])
    if len(kept) == len(found):
        return runs
    cut: Counter[str] = Counter()
    for word, count in runs.items():
        for common, letters in groupby(word, key=kept.__contains__):
            if common:
                cut["".join(letters)] += count
    return cut


def normalise(text: str) -> str:
    """The form of a caption that is encoded, and that decoding returns: Unicode NFC, lower case, with lone surrogates replaced by U+FFFD.

    Nothing else changes: no space is added, merged or removed, and no other character is replaced.
    """
    clean = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if has_surrogate(text) else text
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", clean).lower())


def has_surrogate(text: str) -> bool:
    """Whether a text holds half a character, which is no Unicode: as from bytes that are not UTF-8 on a command line."""
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False
