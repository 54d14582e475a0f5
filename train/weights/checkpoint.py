"""Checkpoints: tensors as logical (name, offset) fragments, in files of each rank's own (docs/contracts.md, section 6).

    <stage>/checkpoints/step-00000100/rank-0.bin ...   raw little-endian tensor bytes
                                      rank-0.json ...  tensors -> place in the file, SHA-256 of each piece
                                      index.json       tensors -> ranks, which hold how much; SHA-256 of the files above; written when they are there
                                      meta.json        written last; the checkpoint exists when it does

Nothing is pickled. The layout depends neither on the number of ranks nor on the engine.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from infra import checkpoint_folders, lease, schemas, storage
from infra.checkpoint_folders import META as META
from infra.checkpoint_folders import folder as folder
from infra.digests import digest
from infra.errors import CheckpointError, ConfigError, DataError, UnreachableError
from infra.run_folder import commit, versions
from infra.run_records import ChangePoint
from infra.stored import Count, Number, Seconds, Sha256, Stored, check
from infra.world import World
from train.ranks.device import patient_group
from train.weights import agreement, layout
from train.weights.agreement import alike
from train.weights.checkpoint_storage import Reader, Writer, write_index
from train.weights.fragments import Fragment, even_slice
from train.weights.safetensors_file import Kind

log = logging.getLogger(__name__)

_DAMAGE = (DataError, ValueError, KeyError, TypeError, IndexError, AttributeError)
"""The errors that reading damaged files raises. Any other error, such as a lost rank or too little memory, does not mean that a checkpoint is damaged."""


class _Position(Stored):
    """The position of the loader."""

    epoch: Count = 0
    index: Count = 0


class _LossScale(Stored):
    """State of the loss scale, for engines that scale the loss."""

    value: Number
    good: Count
    skipped: Count


class _Plateau(Stored):
    """State of ``train.loop.plateau.Plateau``."""

    halved: list[Count]
    best: Number | None
    idle: Count
    sum: Number
    count: Count


class Resumable(Stored):
    """What meta.json must hold for training to resume from it. An export needs none of it."""

    shapes: dict[str, list[Count]]
    updates: Count
    elapsed_s: Seconds
    loader: dict[str, Any]


class Meta(Stored):
    """meta.json."""

    step: Count
    index: Sha256
    shapes: dict[str, Annotated[list[Count], Field(max_length=16)]] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    parents: dict[str, str] = Field(default_factory=dict)
    updates: Count = 0
    elapsed_s: Seconds = 0.0
    loader: _Position = Field(default_factory=_Position)
    bad_updates: dict[str, Count] = Field(default_factory=dict)
    changes: list[ChangePoint] = Field(default_factory=list)
    loss_scale: _LossScale | None = None
    engine: dict[str, Any] | None = None
    plateau: _Plateau | None = None


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
    """Write a checkpoint, and delete those that it supersedes. Collective. ``train.weights.checkpointer.Checkpointer`` does this in the background.

    Args:
        meta: JSON-able facts (shapes, loader position, configuration, lineage); step, commit, versions and world size are added.
        keep: number of newest checkpoints that are kept, this one included.
        keep_every: the first checkpoint at or after each multiple of this many updates is never deleted; 0: no such checkpoints.
        group: process group of the collectives; None: the default one.

    Raises:
        SupersededError: another launcher has taken over the stage; nothing was written.
    """
    url = folder(stage_url, step)
    with alike(group):
        if world.is_main:
            lease.check()  # before anything is touched: another launcher may be writing the same checkpoint
            if storage.exists(storage.join(url, META)):
                storage.delete(storage.join(url, META))  # rewritten below: no marker while files change
        own = layout.held(fragments)
    index = _write(url, fragments, own, group)
    if world.is_main:
        facts = {
            "schema": schemas.CHECKPOINT,
            "step": step,
            "world_size": world.size,
            "commit": commit(),
            "versions": versions(),
            "index": index,
        }
        lease.check()  # once more, because writing may have taken long
        storage.write_json(storage.join(url, META), meta | facts | {"sha256": digest(meta | facts)})
        for old in superseded(complete(stage_url), step, keep, keep_every):
            if old > step:
                log.warning("%s: dropped: it could not be read, and the run went on from an earlier one", folder(stage_url, old))
            storage.delete(storage.join(folder(stage_url, old), META))
            storage.delete_prefix(folder(stage_url, old))
    return url


def _write(url: str, fragments: dict[str, Fragment], own: dict[str, layout.Row], group: Any) -> str:
    """Write all files but the marker, and return the digest of the index on the main rank. No rank writes before all have told what they hold."""
    tensors = layout.tensors(own, group)
    writer = Writer(url, dist.get_rank() if dist.is_initialized() else 0)
    with alike(group):
        writer.write(fragments)
    parts = agreement.gather(b"" if writer.part is None else writer.part[0].to_bytes(8, "little") + writer.part[1], group)
    found = ""
    with alike(group):
        if tensors is not None and parts is not None:
            told = [(int.from_bytes(part[:8], "little"), part[8:]) if part else None for part in parts]
            found = write_index(url, tensors, told)
    return found


def superseded(steps: list[int], step: int, keep: int, keep_every: int) -> list[int]:
    """Which of the complete checkpoints are deleted once ``step`` is written. Kept are the newest ``keep`` up to ``step`` and the first at or after each multiple
    of ``keep_every``. Those after ``step`` are deleted: the run could not resume from them, and will write them again."""
    until = [old for old in steps if old <= step]
    permanent = {new for old, new in pairwise([0, *until]) if keep_every and new // keep_every > old // keep_every}
    return [old for old in until[:-keep] if old not in permanent] + [new for new in steps if new > step]


def complete(stage_url: str) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(checkpoint_folders.complete(stage_url))


More = Callable[[dict[str, Any]], Iterable[dict[str, Fragment]]]
"""Called with the content of meta.json; yields groups of fragments that are read after all others. A group is filled before the next is asked for. Every rank
must yield the same number of groups."""


def load(stage_url: str, step: int, fragments: dict[str, Fragment], more: More | None = None) -> dict[str, Any]:
    """Restore fragments in place from the checkpoint of ``step``. Collective.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file is damaged (its hash differs).
        UnreachableError, ConfigError: the storage does not answer or refuses access, or there is no room for a copy; the checkpoint itself may be intact.
    """
    url = folder(stage_url, step)
    meta, reader = _read_alike(url)
    for lot in chain([fragments], more(meta) if more is not None else ()):
        with alike(patient_group()):
            _load(url, lot, reader)
    return meta


def read_meta(url: str) -> dict[str, Any]:
    """The content of meta.json of a complete checkpoint.

    Raises:
        CheckpointError: it is damaged.
        ConfigError: another version of this code wrote it, in a form that this version does not read.
        DataError: there is none.
    """
    place = storage.join(url, META)
    meta = storage.read_json(place)
    named = meta.pop("sha256", None) if isinstance(meta, dict) else None
    if named is None or digest(meta) != named:
        raise CheckpointError(f"{place}: damaged: its content has another hash than it names.")
    stage = url.rstrip("/").split("/")[-3:][0]
    remedy = f"train in a new run folder: launcher.py {stage} PRESET run.name=NAME"
    schemas.require(meta.get("schema"), schemas.CHECKPOINT, place, remedy, schemas.OLDER_CHECKPOINT)
    _check(meta, Meta, place)
    return dict(meta)


def check_resumable(meta: dict[str, Any], stage_url: str) -> None:
    """Check that meta.json holds everything that resuming needs, before any of it is used.

    Raises:
        CheckpointError: something is missing.
    """
    _check(meta, Resumable, storage.join(folder(stage_url, int(meta["step"])), META))


def _check(found: Any, model: type[Stored], place: str) -> None:
    try:
        check(found, model, place)
    except DataError as error:
        raise CheckpointError(str(error)) from error


def _load(url: str, fragments: dict[str, Fragment], reader: Reader) -> None:
    """Of this rank alone."""
    try:
        reader.fill(fragments)
    except Exception as error:
        raise _judged(url, error) from error


def _read_alike(url: str) -> tuple[dict[str, Any], Reader]:
    """What every rank must know before tensors are read, or the same error on every rank. One rank reads the facts."""
    group, known = patient_group(), b""
    with alike(group):
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                known = json.dumps(read_meta(url)).encode()
            except Exception as failure:
                raise _judged(url, failure) from failure
    meta: dict[str, Any] = json.loads(agreement.broadcast(known, group))
    reader = Reader(url, meta.get("index", ""))
    with alike(group):
        try:
            reader.catalogue()
        except Exception as failure:
            raise _judged(url, failure) from failure
    return meta, reader


def _judged(url: str, error: BaseException) -> BaseException:
    """The error as a CheckpointError if it is one that damaged files cause, otherwise unchanged."""
    if isinstance(error, UnreachableError | ConfigError) or not isinstance(error, _DAMAGE):
        return error
    return CheckpointError(f"{url}: {error}")


def load_newest(stage_url: str, fragments: dict[str, Fragment], world: World, more: More | None = None) -> dict[str, Any] | None:
    """Restore from the newest checkpoint that is not damaged; each damaged one is reported in the log. Returns its meta.json, or None if there is no checkpoint.
    Collective.

    Raises:
        CheckpointError: there are checkpoints, and all of them are damaged.
    """
    failure: CheckpointError | None = None
    for step in reversed(_complete_alike(stage_url, world)):
        try:
            return load(stage_url, step, fragments, more)
        except CheckpointError as error:
            log.error("CHECKPOINT NOT USABLE: %s; falling back to the checkpoint before it", error)
            failure = error
    if failure is not None:
        raise failure
    return None


def any_complete(stage_url: str, world: World) -> bool:
    """Whether ``load_newest`` will find a checkpoint. Collective."""
    return bool(_complete_alike(stage_url, world))


def _complete_alike(stage_url: str, world: World) -> list[int]:
    """The complete checkpoints that the main rank finds, on all ranks."""
    steps = [complete(stage_url) if world.is_main else []]
    if dist.is_initialized():
        dist.broadcast_object_list(steps, group=patient_group())
    return steps[0]


class StoredTensors:
    """All tensors of a checkpoint under ``prefix/``, for one process and without an engine: what they are, and how to read them into memory of the caller's."""

    def __init__(self, url: str, prefix: str) -> None:
        """
        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
        """
        self.url, self.prefix = url, prefix
        meta = read_meta(url)
        shapes: dict[str, list[int]] = meta.get("shapes", {})
        self._reader = Reader(url, meta["index"])
        known = self._reader.catalogue().kinds
        self.kinds: dict[str, Kind] = {}
        for name, shape in shapes.items():
            entry = known.get(f"{prefix}/{name}")
            if entry is None:
                raise CheckpointError(f"{url}: holds no '{prefix}/{name}'.")
            if math.prod(shape) != entry.size:
                raise CheckpointError(f"{url}: '{prefix}/{name}' holds {entry.size} elements, its shape {shape} has {math.prod(shape)}.")
            self.kinds[name] = Kind(tuple(shape), entry.dtype)

    def allocated(self, allocate: Callable[[dict[str, Kind]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Room for all of them.

        Raises:
            CheckpointError: there is none: more than this machine can address, which no checkpoint holds that was written here.
        """
        size = sum(kind.bytes for kind in self.kinds.values())
        try:
            return allocate(self.kinds)
        except (RuntimeError, MemoryError, OverflowError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CheckpointError(
                f"{self.url}: its tensors under '{self.prefix}/' would take {size:,} bytes, for which there is no room ({str(error).splitlines()[0]}): use a "
                "larger machine, or the checkpoint is damaged."
            ) from error

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Read all of them into such tensors, in one pass over the checkpoint's files.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        _load(self.url, {f"{self.prefix}/{name}": even_slice(tensor, 0, 1) for name, tensor in tensors.items()}, self._reader)


def read_tensors(url: str, prefix: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint whose names begin with ``prefix/``, in their full shapes. For one process; needs no engine.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    stored = StoredTensors(url, prefix)
    out = stored.allocated(lambda kinds: {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()})
    stored.fill(out)
    return out


def content_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes: identifies a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
