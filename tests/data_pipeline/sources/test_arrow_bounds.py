"""Arrow files whose offsets and indices lead outside of their buffers: nothing is read from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow
import pytest

from data_pipeline.sources.arrow_bounds import check_bounds

TEXTS = pyarrow.array(["a red fox", "a blue house", None, "three"])
LISTS = pyarrow.array([["a", "b"], [], None, ["c"]])


def with_buffer(array: Any, place: int, change: Callable[[Any], None], kind: Any = np.int32) -> Any:
    """The same array with one buffer of offsets or indices changed."""
    buffers = array.buffers()
    own = 2 + array.type.num_fields * 0
    values = np.frombuffer(buffers[place], kind).copy()
    change(values)
    buffers[place] = pyarrow.py_buffer(values)
    children = [array.values] if pyarrow.types.is_list(array.type) else None
    return pyarrow.Array.from_buffers(array.type, len(array), buffers[: own if children else 3], children=children)


def put(place: int, value: int) -> Callable[[Any], None]:
    return lambda values: values.__setitem__(place, value)


@pytest.mark.parametrize(("place", "value"), [(0, 6060), (2, 1 << 30), (4, 6300), (1, -5), (1, 400)])
def test_texts_that_point_elsewhere_are_refused(place: int, value: int) -> None:
    with pytest.raises(pyarrow.ArrowInvalid):
        check_bounds(with_buffer(TEXTS, 1, put(place, value)))


@pytest.mark.parametrize(("place", "value"), [(1, -1), (1, 3), (2, 1)])
def test_so_are_lists_and_what_lies_in_structs(place: int, value: int) -> None:
    wrong = with_buffer(LISTS, 1, put(place, value))
    for array in (wrong, pyarrow.StructArray.from_arrays([TEXTS, wrong], ["caption", "more"])):
        with pytest.raises(pyarrow.ArrowInvalid):
            check_bounds(array)


@pytest.mark.parametrize("index", [-5, 3, 1 << 20])
def test_so_are_words_that_a_dictionary_does_not_have(index: int) -> None:
    words = pyarrow.DictionaryArray.from_arrays(np.array([0, index, 1], np.int32), pyarrow.array(["a", "b", "c"]), safe=False)
    with pytest.raises(pyarrow.ArrowInvalid):
        check_bounds(words)


def test_sound_columns_pass_also_in_slices_and_with_text_that_is_no_utf_8() -> None:
    broken = pyarrow.array([b"fine", b"\xff\xfe"]).view(pyarrow.string())
    words = pyarrow.array(["a", "b", "a", None]).dictionary_encode()
    struct = pyarrow.array([{"bytes": b"1", "path": "x"}, None, {"bytes": None, "path": "y"}, {"bytes": b"", "path": None}])
    for array in (
        TEXTS,
        LISTS,
        words,
        struct,
        broken,
        pyarrow.array([], pyarrow.string()),
        pyarrow.array([1, 2]),
        pyarrow.array([[["a"]], [["b"], []]]),
    ):
        check_bounds(array)
        check_bounds(array.slice(1))
