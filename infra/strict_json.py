"""A strict JSON parser for files that are read back: any input gives plain values or a ValueError, in time and memory proportional to its size.

Python's own parser accepts input that our files never hold and that would break their readers: NaN and infinities, integers of any length, repeated keys
(the last one wins silently), and nesting so deep that the recursion ends the process.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

MAX_BYTES = 512 << 20
"""Largest file that is parsed; the index of 250 million images takes a tenth of it."""
MAX_DEPTH = 64
"""Most levels of nested objects and lists. Our files have at most ten."""
_MOST_DIGITS = 60  # long enough for any file; descriptions of fields (infra/stored.py) set tighter bounds


class Twice(dict[str, Any]):
    """An object in which a key occurs twice, with the last values: which one is meant, nobody can tell."""


Taken = Callable[[dict[str, Any]], Any]
"""Gets an object of a text that is being parsed, and returns what takes its place."""


def loads(text: str, *, alike: bool = False, taken: Taken | None = None, marked: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        alike: of long tables whose rows repeat themselves: equal lists of words inside objects become one list, which must not be changed in place, and so
            do equal values of the key "name".
        taken: with ``alike``, called with each object as soon as it is complete, the inner ones first, so that a table need not be in memory whole.
        marked: an object in which a key occurs twice becomes a ``Twice``, instead of being refused.

    Raises:
        ValueError: the text is not JSON, or is JSON that our writers never produce; the message says what is wrong.
    """
    try:
        found = (_sharing(taken) if alike else _MARKING if marked else _STRICT).decode(text)
    except RecursionError:
        raise ValueError(f"objects and lists are nested more than {MAX_DEPTH} deep") from None
    _check_depth(found)
    return found


def loads_record(text: str) -> Any:
    """The value of a small JSON text in a record that is read during training: a faster ``loads`` that accepts repeated keys and deep nesting.

    Raises:
        ValueError: the text is not JSON, or holds a number that is not finite.
    """
    try:
        return _FAST.decode(text)
    except RecursionError:
        raise ValueError("objects and lists are nested too deeply") from None


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"objects and lists are nested more than {MAX_DEPTH} deep")


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} occurs twice in one object")
    return found


def _marking(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else Twice(found)


def _sharing(taken: Taken | None) -> json.JSONDecoder:
    """A parser that keeps one of the lists of words that are equal, and one of the names."""
    known: dict[tuple[str | None, ...], list[Any]] = {}

    def pairs(found: list[tuple[str, Any]]) -> Any:
        row = _pairs(found)
        for key, value in found:
            if key == "name" and type(value) is str:
                row[key] = sys.intern(value)
            elif type(value) is list and all(word is None or type(word) is str for word in value):
                row[key] = known.setdefault(tuple(value), value)
        return row if taken is None else taken(row)

    return json.JSONDecoder(object_pairs_hook=pairs, parse_int=_integer, parse_float=_number, parse_constant=_constant)


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _number(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise ValueError(f"the number {digits[:80]} is not finite")
    return found


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_int=_integer, parse_float=_number, parse_constant=_constant)
_MARKING = json.JSONDecoder(object_pairs_hook=_marking, parse_int=_integer, parse_float=_number, parse_constant=_constant)
_FAST = json.JSONDecoder(parse_constant=_constant)


def written(value: Any, *, for_people: bool = True) -> bytes:
    """JSON as this project stores it: with sorted keys, so that equal values are equal files. A number that is not finite is a ValueError. Without the line breaks
    and indents that people want to see, a large table takes half the bytes."""
    form: dict[str, Any] = {"indent": 2} if for_people else {"separators": (",", ":")}
    return (json.dumps(value, sort_keys=True, allow_nan=False, **form) + "\n").encode()
