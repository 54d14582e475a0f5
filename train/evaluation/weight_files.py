"""Reads weights of evaluation networks from files that the configuration names."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import DataError


def read_weights(path: str, key: str) -> dict[str, Tensor]:
    """Read tensors by name from a .safetensors file, or from a torch file that holds only tensors: other objects are refused, and not loaded.

    Args:
        path: the file.
        key: the configuration key that names the file, for messages.

    Raises:
        DataError: the file is missing, or holds something that is not a tensor.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file ({key}).")
    try:
        found = load_file(path) if path.endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read as weights ({type(error).__name__}: {words}); {key} names files of tensors.") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise DataError(f"{path}: holds no tensors by name; {key} takes state dictionaries.")
    return found
