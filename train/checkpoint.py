"""Checkpoints: torch.distributed.checkpoint over our storage, in logical (name, offset) fragments (docs/contracts.md, section 6).

    <stage>/checkpoints/step-00000100/rank-0.bin ...   raw little-endian tensor bytes
                                      index.json       tensors -> chunks -> file, position, SHA-256
                                      meta.json        written last; the checkpoint exists when it does

Nothing is pickled, and the layout depends on neither the number of ranks nor the engine.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from infra import storage
from infra.errors import CheckpointError, ConfigError, DataError, ReportedError, UnreachableError
from infra.run_folder import commit, versions
from infra.world import World
from train.checkpoint_storage import Reader, Writer
from train.fragments import Fragment, FragmentLoader, FragmentSaver, even_slice

log = logging.getLogger(__name__)


def folder(stage_url: str, step: int) -> str:
    """URL of the checkpoint after ``step`` updates."""
    return storage.join(stage_url, "checkpoints", f"step-{step:08d}")


def save(
    stage_url: str,
    step: int,
    fragments: dict[str, Fragment],
    meta: dict[str, Any],
    world: World,
    keep: int,
    keep_every: int = 0,
    *,
    group: Any = None,
) -> str:
    """Write a checkpoint, and drop all but the newest ``keep``. Collective. ``train.checkpoint_saver.Saver`` does it beside training.

    Args:
        meta: JSON-able facts (shapes, loader position, configuration, lineage); step, commit, versions and world size are added.
        keep_every: checkpoints after a multiple of this many updates are kept for good; 0: none are.
        group: process group of the collectives; None is the default one.
    """
    url = folder(stage_url, step)
    if world.is_main and storage.exists(storage.join(url, "meta.json")):
        storage.delete(storage.join(url, "meta.json"))  # rewritten below: no marker while files change
    if dist.is_initialized():
        dist.barrier(group)
    try:
        dcp.save(dict(fragments), storage_writer=Writer(url), planner=FragmentSaver(), process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _first(error) from error
    if world.is_main:
        facts = {"schema": "checkpoint/1", "step": step, "world_size": world.size, "commit": commit(), "versions": versions()}
        storage.write_json(storage.join(url, "meta.json"), meta | facts)
        for old in complete(stage_url)[:-keep]:
            if keep_every and old % keep_every == 0:
                continue
            storage.delete(storage.join(folder(stage_url, old), "meta.json"))
            storage.delete_prefix(folder(stage_url, old))
    return url


def complete(stage_url: str) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    names = storage.list_files(storage.join(stage_url, "checkpoints"))
    return sorted(int(name.split("/")[0].removeprefix("step-")) for name in names if name.endswith("/meta.json"))


def load(stage_url: str, step: int, fragments: dict[str, Fragment]) -> dict[str, Any]:
    """Restore fragments in place from the checkpoint of ``step``. Collective.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or a file is damaged (its hash differs).
        UnreachableError, ConfigError: the storage gives no answer, refuses, or there is no room for a copy; the checkpoint may be whole.
    """
    url = folder(stage_url, step)
    try:
        meta, reader = _read_alike(url)
        dcp.load(dict(fragments), storage_reader=reader, planner=FragmentLoader(), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        first = _first(error)
        raise (first if isinstance(first, UnreachableError | ConfigError) else CheckpointError(f"{url}: {first}")) from error
    except (UnreachableError, ConfigError):
        raise
    except (DataError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{url}: {error}") from error
    return meta


def _read_alike(url: str) -> tuple[dict[str, Any], Reader]:
    """What every rank must know before tensors are read, or the same error on every rank: the reading itself is collective."""
    meta: dict[str, Any] = {}
    reader, error = Reader(url), None
    try:
        meta = storage.read_json(storage.join(url, "meta.json"))
        reader.read_metadata()
    except (ReportedError, RuntimeError, ValueError, KeyError, TypeError) as failure:
        error = failure
    errors = [error]
    if dist.is_initialized():
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error)
    for first in errors:
        if first is not None:
            raise first
    return meta, reader


def _first(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank that failed: every rank gets the failures of all."""
    return error.failures[min(error.failures)][0]


def load_newest(stage_url: str, fragments: dict[str, Fragment], world: World) -> dict[str, Any] | None:
    """Restore from the newest checkpoint that is whole, falling back over damaged ones with a loud message; None if there is none. Collective."""
    steps = [complete(stage_url) if world.is_main else []]
    if dist.is_initialized():
        dist.broadcast_object_list(steps)
    failure: CheckpointError | None = None
    for step in reversed(steps[0]):
        try:
            return load(stage_url, step, fragments)
        except CheckpointError as error:
            log.error("CHECKPOINT NOT USABLE: %s; falling back to the checkpoint before it", error)
            failure = error
    if failure is not None:
        raise failure
    return None


def read_tensors(url: str, prefix: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint under ``prefix/``, shaped, in one process and without an engine.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    shapes: dict[str, list[int]] = storage.read_json(storage.join(url, "meta.json"))["shapes"]
    reader = Reader(url)
    known = reader.read_metadata().state_dict_metadata
    out: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        entry = known.get(f"{prefix}/{name}")
        if entry is None:
            raise CheckpointError(f"{url}: holds no '{prefix}/{name}'.")
        out[name] = torch.empty(shape, dtype=entry.properties.dtype)  # type: ignore[union-attr]
    fragments: dict[str, Any] = {f"{prefix}/{name}": even_slice(tensor, 0, 1) for name, tensor in out.items()}
    dcp.load(fragments, storage_reader=reader, planner=FragmentLoader(), no_dist=True)
    return out


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and bytes: the identity of a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.reshape(1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
