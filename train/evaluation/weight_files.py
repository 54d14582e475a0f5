"""Weights of judging networks from files that a user names."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from infra.errors import DataError


def read_weights(path: str, key: str) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a torch file of tensors alone (nothing else in it is loaded).

    Args:
        path: the file.
        key: the configuration key that names it, for messages.

    Raises:
        DataError: the file is missing, or holds anything but tensors.
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
