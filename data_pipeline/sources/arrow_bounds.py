"""Offsets and indices of Arrow columns. pyarrow follows them as a file gives them: wrong ones read other memory of this process, or end it."""

from __future__ import annotations

from typing import Any

import pyarrow
import pyarrow.compute


def check_bounds(array: Any) -> None:
    """Refuse a column that points outside of its own buffers. Text that is no UTF-8 is none of this: it is one row's.

    Raises:
        pyarrow.ArrowInvalid: it does.
    """
    types, kind = pyarrow.types, array.type
    array.validate()
    if isinstance(array, pyarrow.ExtensionArray):
        check_bounds(array.storage)
    elif types.is_dictionary(kind):
        bounds = pyarrow.compute.min_max(array.indices)
        if bounds["min"].is_valid and not 0 <= bounds["min"].as_py() <= bounds["max"].as_py() < len(array.dictionary):
            raise pyarrow.ArrowInvalid("dictionary indices out of bounds")
        check_bounds(array.dictionary)
    elif types.is_struct(kind):
        for place in range(kind.num_fields):
            check_bounds(array.field(place))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        offsets = array.offsets.to_numpy()
        if len(offsets) and (offsets[0] < 0 or offsets[-1] > len(array.values) or (offsets[1:] < offsets[:-1]).any()):
            raise pyarrow.ArrowInvalid("list offsets out of bounds")
        check_bounds(array.values)
    elif types.is_fixed_size_list(kind):
        check_bounds(array.values)
    elif types.is_string(kind):
        array.view(pyarrow.binary()).validate(full=True)
    elif types.is_large_string(kind):
        array.view(pyarrow.large_binary()).validate(full=True)
    elif types.is_string_view(kind):
        array.view(pyarrow.binary_view()).validate(full=True)
    else:
        array.validate(full=True)
