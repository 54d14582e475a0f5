"""Seeded damage to stored files: bytes as disks and networks spoil them, and JSON as hands and strangers change it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_RAW = "@raw-{}@"
_TEXTS = ("[" * 3000 + "]" * 3000, '{"a":' * 500 + "1" + "}" * 500, "NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"')
"""What ``json.dumps`` would not write."""
_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 1.5, -(2**63), 2**63, 10**30, 1e300, "", "../x", "/etc/x", "a/b", "x" * 5000, "nan", "\x1b[2J\n"),
    *([], {}, [1], [[]], ["x"], {"a": 1}, {"a": {"b": []}}, [None], {"": None}),
)


def damaged(data: bytes, rng: random.Random, *, as_json: bool = True) -> tuple[str, bytes]:
    """One damage: what it is, and the bytes after it."""
    if as_json and rng.random() < 0.7:
        return _changed(json.loads(data), rng)
    return _spoiled(data, rng)


def _spoiled(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 1, 2, 16, 300)))
    kind = rng.choice(("flip", "zero", "cut", "drop", "repeat", "noise"))
    middle = {
        "flip": bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:end]),
        "zero": bytes(end - start),
        "cut": b"",
        "drop": b"",
        "repeat": data[start:end] * 2,
        "noise": rng.randbytes(end - start),
    }[kind]
    return f"{kind} of bytes {start} to {end}", data[:start] + middle + (b"" if kind == "cut" else data[end:])


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from _places(inner, (*path, key))


def _changed(tree: Any, rng: random.Random) -> tuple[str, bytes]:
    tree = copy.deepcopy(tree)
    path = rng.choice(list(_places(tree)))
    kind = rng.choice(("value", "value", "value", "text", "delete", "rename", "twice"))
    if not path:
        kind = rng.choice(("value", "text"))
    parent, last = tree, path[-1] if path else None
    for key in path[:-1]:
        parent = parent[key]
    raw, value = "", rng.choice(_VALUES)
    if kind == "text":
        raw = rng.choice(_TEXTS)
        value = _RAW.format(0)
    if kind in ("value", "text"):
        if not path:
            tree = value
        else:
            parent[last] = value
    elif kind == "delete" or isinstance(parent, list):
        del parent[last]
    elif kind == "rename":
        parent[f"{last}x"] = parent.pop(last)
    else:
        parent[_RAW.format(1)] = value
    text = json.dumps(tree)
    text = text.replace(json.dumps(_RAW.format(0)), raw).replace(json.dumps(_RAW.format(1)), json.dumps(last))
    return f"{kind} at {'.'.join(map(str, path)) or 'the top'}: {(raw or repr(value))[:40]}", text.encode()
