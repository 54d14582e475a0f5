"""Exported weights: a safetensors file and a JSON description, for other stages and other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from infra import files, schemas, scratch, storage, stored
from infra.errors import CheckpointError
from train.weights import safetensors_file
from train.weights.checkpoint import StoredTensors, content_hash

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"

M = TypeVar("M", bound=nn.Module)


class Description(stored.Identified):
    """The content of config.json, which lies beside exported weights."""

    model: dict[str, Any]


def write(url: str, weights: dict[str, Tensor] | StoredTensors, config: Any, /, **facts: Any) -> str:
    """Write weights, then (the marker) their description, and return the content hash that names them.

    Args:
        weights: tensors, or those of a checkpoint, which go through a file of TMPDIR and take little memory, however large they are.
        config: the dataclass or mapping that shapes the model.
        facts: lineage and anything else worth keeping.
    """
    with scratch.folder("export-") as room:
        path = Path(room, WEIGHTS)
        if isinstance(weights, StoredTensors):
            mapped = weights.allocated(lambda kinds: safetensors_file.mapped(path, kinds))
            weights.fill(mapped)
            identity = content_hash(mapped)
            del mapped  # its pages are the file's
        else:
            identity = content_hash(weights)
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, path)
        storage.upload_file(path, storage.join(url, WEIGHTS))
    shape = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    storage.write_json(storage.join(url, DESCRIPTION), {"schema": schemas.EXPORT, "model": shape, "content_hash": identity, **facts})
    return identity


def describe(url: str) -> dict[str, Any]:
    """The description of exported weights.

    Raises:
        DataError: there is no description, or it is damaged.
        ConfigError: it has another schema number.
    """
    place = storage.join(url, DESCRIPTION)
    description = stored.read(place, Description)
    schemas.require(description.get("schema"), schemas.EXPORT, place, "export the weights again: launcher.py export RUN_FOLDER --stage STAGE")
    return description


def open_as(url: str, build: Callable[[], M]) -> tuple[M, str]:
    """A module with exported weights, and their content hash. The module is built once without memory first: whoever sends a configuration with absurd sizes
    beside weights gets the sentence of ``check_shapes``, and not this machine's memory.

    Raises:
        CheckpointError: as ``read``.
    """
    identity, tensors = read_tensors(url)
    with torch.device("meta"):
        check_shapes(url, build(), tensors)
    module = build()
    module.load_state_dict(tensors)
    return module, identity


def read(url: str, module: nn.Module) -> str:
    """Load exported weights into a module of the same shape, and return their content hash.

    Raises:
        CheckpointError: the weights are damaged, or have another shape.
    """
    identity, tensors = read_tensors(url)
    check_shapes(url, module, tensors)
    module.load_state_dict(tensors)
    return identity


def check_shapes(url: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Check that tensors have the names and shapes of a module's weights, and are numbers of their kind.

    Raises:
        CheckpointError: they do not; the message names the first difference.
    """
    expected = {name: list(p.shape) for name, p in module.state_dict().items()}
    found = {name: list(t.shape) for name, t in tensors.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"{url}: weights of another model: '{odd[0]}' is {found.get(odd[0])}, this configuration builds {expected.get(odd[0])}."
        )
    whole = sorted(name for name, tensor in tensors.items() if not tensor.is_floating_point() and module.state_dict()[name].is_floating_point())
    if whole:  # copied into a module, they would be converted without a word
        raise CheckpointError(f"{url}: '{whole[0]}' holds {tensors[whole[0]].dtype}, which are no weights; export it again.")


def read_tensors(url: str) -> tuple[str, dict[str, Tensor]]:
    """The content hash and the tensors of exported weights. A local file is memory-mapped, so that all processes of the machine share its memory; an object is
    downloaded to TMPDIR first.

    Raises:
        CheckpointError: they are damaged.
    """
    description = describe(url)
    place = storage.join(url, WEIGHTS)
    with scratch.folder("export-") as room:  # the mapping stays valid after the file is deleted
        if storage.is_remote(place):
            path = Path(room, WEIGHTS)
            storage.download_file(place, path)
        else:
            path = storage.local_path(place)
        try:
            with files.read_errors(place):
                tensors = load_file(files.regular(path, place))
        except SafetensorError as error:
            raise CheckpointError(f"{url}: {WEIGHTS} is damaged ({error}); export it again.") from error
    if content_hash(tensors) != description["content_hash"]:
        raise CheckpointError(f"{url}: {WEIGHTS} is damaged: its content hash differs from the one in {DESCRIPTION}; export it again.")
    return str(description["content_hash"]), tensors


def to_device(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module to a device and freeze it, for inference."""
    return module.to(device).eval().requires_grad_(False)
