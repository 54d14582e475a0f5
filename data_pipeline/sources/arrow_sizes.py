"""What the values of Arrow rows take once they are copied into Python objects. A dictionary holds a value once that a million rows may name, and a list of
nothing takes no bytes however long it is: memory is bounded by what rows will be, not by what their file is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
from numpy.typing import NDArray

from data_pipeline.sources.rows_to_pairs import LARGE_IMAGE, LARGE_TEXT, MAX_IMAGE_BYTES, MAX_TEXT_BYTES

_OBJECT = 64
"""Bytes that any value takes as a Python object, with its place in a list."""
_MOST_VALUES = 1 << 22
"""Values in the lists of some rows up to which they are looked at together; in those of one row, as many are too many in any case."""
_AT_ONCE = MAX_IMAGE_BYTES
"""Bytes of rows that are copied together; a row that is not refused has about as many at the most."""


def pieces(batch: Any, image: str) -> Iterator[tuple[Any, str]]:
    """A batch in pieces of few bytes; and single rows of too many bytes, each with the reason that refuses it.

    Args:
        batch: rows whose offsets and indices are sound.
        image: name of the column of images, of which a row may have more than of the others.
    """
    limits = [MAX_IMAGE_BYTES if name == image else MAX_TEXT_BYTES for name in batch.schema.names]
    sizes = [row_bytes(column) for column in batch.columns]
    text = sum((size for size, name in zip(sizes, batch.schema.names, strict=True) if name != image), np.zeros(batch.num_rows, np.int64))
    large = [text > MAX_TEXT_BYTES, *(size > limit for size, limit in zip(sizes, limits, strict=True) if limit == MAX_IMAGE_BYTES)]
    reasons = [LARGE_TEXT, LARGE_IMAGE]
    begin, held = 0, 0
    for row, size in enumerate(sum(sizes, np.zeros(batch.num_rows, np.int64)).tolist()):
        reason = next((reason for reason, rows in zip(reasons, large, strict=False) if rows[row]), "")
        if row > begin and (reason or held + size > _AT_ONCE):
            yield batch.slice(begin, row - begin), ""
            begin, held = row, 0
        held += size
        if reason:
            yield batch.slice(row, 1), reason
            begin, held = row + 1, 0
    if begin < batch.num_rows:
        yield batch.slice(begin), ""


def row_bytes(column: Any) -> NDArray[np.int64]:
    """About how many bytes the value of each row takes as Python objects: int64 [rows]."""
    try:
        return _bytes(column)
    except _ManyError as many:
        if len(column) == 1:
            return np.array([many.values * _OBJECT], np.int64)
    return np.concatenate([row_bytes(column.slice(row, 1)) for row in range(len(column))])


class _ManyError(Exception):
    """Lists hold so many values that they are not looked at."""

    def __init__(self, values: int) -> None:
        super().__init__(f"{values:,} values")
        self.values = values


def _bytes(array: Any) -> NDArray[np.int64]:
    types, kind = pyarrow.types, array.type
    if isinstance(array, pyarrow.ExtensionArray):
        return _bytes(array.storage)
    if types.is_dictionary(kind):
        words = _bytes(array.dictionary)
        return np.append(words, _OBJECT)[array.indices.fill_null(len(words)).to_numpy(zero_copy_only=False)] if len(words) else _objects(array)
    if types.is_struct(kind):
        return sum((_bytes(array.field(place)) for place in range(kind.num_fields)), _objects(array))
    if types.is_fixed_size_list(kind):
        values = _few(array.values, array.offset * kind.list_size, len(array) * kind.list_size)
        return _objects(array) + (_bytes(values).reshape(len(array), -1).sum(1) if len(values) else 0)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        offsets = array.offsets.to_numpy()
        if not len(array):
            return _objects(array)
        values = _bytes(_few(array.values, int(offsets[0]), int(offsets[-1] - offsets[0])))
        return _objects(array) + np.diff(np.concatenate([[0], np.cumsum(values)])[offsets - offsets[0]])
    if types.is_string_view(kind) or types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        return _objects(array) + np.maximum(views[array.offset : array.offset + len(array), 0], 0)
    as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}.get(kind, kind)
    if types.is_binary(as_bytes) or types.is_large_binary(as_bytes):
        lengths = pyarrow.compute.binary_length(array.view(as_bytes))  # of text that may be no UTF-8
        return _objects(array) + lengths.fill_null(0).to_numpy(zero_copy_only=False)
    return _objects(array)


def _few(values: Any, begin: int, count: int) -> Any:
    if count > _MOST_VALUES:
        raise _ManyError(count)
    return values.slice(begin, count)


def _objects(array: Any) -> NDArray[np.int64]:
    return np.full(len(array), _OBJECT, np.int64)
