"""Numbers with their nouns. Milliseconds."""

from __future__ import annotations

import pytest

from infra.text import counted


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("picture",), "0 pictures"),
        (1, ("picture",), "1 picture"),
        (1024, ("new picture",), "1,024 new pictures"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_one_thing_has_a_singular(count: int, words: tuple[str, ...], text: str) -> None:
    assert counted(count, *words) == text
