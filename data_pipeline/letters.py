"""What counts as a letter of a caption: the rule by which captions are split before runs of letters are merged (tokenizer.letters)."""

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
    """Runs of letters in a normalised caption, and every other character alone."""
    if letters == "a-z":
        return re.compile(r"[a-z]+|[^a-z]", re.DOTALL)
    # Marks, too: the vowel signs of India's scripts and the points of Arabic and Hebrew. 're' has no class for either.
    numbers = [number for number in range(sys.maxunicode + 1) if unicodedata.category(chr(number))[0] in "LM"]
    spans = "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in _spans(numbers))
    return re.compile(rf"[{spans}]+|.", re.DOTALL)


def _spans(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Sorted numbers as (first, last) of each unbroken run."""
    for _, several in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in several]
        yield run[0], run[-1]


def is_run(word: str, letters: Letters) -> bool:
    """Whether a word of ``split`` is a run of letters."""
    return word[0] in A_TO_Z if letters == "a-z" else unicodedata.category(word[0])[0] in "LM"


def common_runs(runs: Mapping[str, int], room: int) -> Mapping[str, int]:
    """Runs cut at all letters but the ``room`` commonest: Chinese has thousands, and the rest are spelled as bytes. Counts add up."""
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
