"""How text is split into lines, and how things are counted in it."""

from __future__ import annotations

import re

_ENDS = re.compile(r"\r\n|\n|\r")


def lines(text: str) -> list[str]:
    r"""The lines of a text, which end at ``\n``, ``\r\n`` and ``\r`` alone.

    ``str.splitlines`` also splits at U+2028, U+0085, the vertical tab, the form feed and three ASCII separators. These occur inside captions and ids, which it
    would cut in two.
    """
    found = _ENDS.split(text)
    return found[:-1] if not found[-1] else found


def counted(count: int, noun: str, nouns: str = "") -> str:
    """A number with its noun: '1 picture', '1,024 pictures'; ``nouns`` is the plural, where it is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
