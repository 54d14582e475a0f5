"""How text is split into lines."""

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
