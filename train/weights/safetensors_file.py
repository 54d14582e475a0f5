"""A safetensors file that is made before its tensors are: they are filled in place, in pages of the file that the kernel writes out as it needs room, so that
weights of any size take little memory. Byte for byte what the safetensors package writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""In the order in which a file has them."""
_ALIGNMENT = 8


@dataclass(frozen=True)
class Kind:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def mapped(path: Path, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
    """Make a file of such tensors, zeros at first, and return them: what is written to them is written to the file."""
    order = list(_NAMES)
    names = sorted(kinds, key=lambda name: (order.index(kinds[name].dtype), name))
    header, places, end = {}, {}, 0
    for name in names:
        kind, places[name] = kinds[name], end
        header[name] = {"dtype": _NAMES[kind.dtype], "shape": list(kind.shape), "data_offsets": [end, end + kind.bytes]}
        end += kind.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
    whole = np.memmap(path, np.uint8, "r+", start)
    return {name: _view(whole[places[name] : places[name] + kinds[name].bytes], kinds[name]) for name in names}


def _view(data: np.ndarray, kind: Kind) -> Tensor:  # type: ignore[type-arg]
    return torch.from_numpy(data).view(kind.dtype).reshape(kind.shape) if len(data) else torch.empty(kind.shape, dtype=kind.dtype)
