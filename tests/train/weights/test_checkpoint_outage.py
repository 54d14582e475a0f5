"""Checkpoints when the storage gives no answer, refuses or is full: an outage is no damage, and the cause keeps its exit code. About 10 s."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra import storage
from infra.errors import CheckpointError, ConfigError, ExitCode, NoRoomError, ReportedError, UnreachableError
from infra.world import World
from tests.support.ranks import run_in_ranks
from train.weights import checkpoint, checkpoint_storage
from train.weights.fragments import Fragment, even_slice


def fragments(value: float) -> dict[str, Fragment]:
    return {"model/w": even_slice(torch.full((8,), value), 0, 1)}


def save(url: str, step: int) -> None:
    checkpoint.save(url, step, fragments(float(step)), {"shapes": {"w": [8]}}, World.single(), keep=3)


@pytest.fixture
def stage(tmp_path: Path) -> str:
    """A stage with two checkpoints."""
    for step in (5, 10):
        save(str(tmp_path), step)
    return str(tmp_path)


def broken(name: str, error: Exception, inner: Any) -> Any:
    """A storage function that fails for files of this name."""

    def function(url: str, *arguments: Any) -> Any:
        if str(url).endswith(name):
            raise error
        return inner(url, *arguments)

    return function


@pytest.mark.parametrize("error", [UnreachableError("x: failed after 6 attempts"), ConfigError("x: refused (AccessDenied)"), NoRoomError("x: full")])
@pytest.mark.parametrize("name", ["meta.json", "index.json", "rank-0.json"])
def test_a_silent_storage_is_not_taken_for_a_damaged_checkpoint(stage: str, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str) -> None:
    monkeypatch.setattr(storage, "read_at_most", broken(f"step-00000010/{name}", error, storage.read_at_most))
    with pytest.raises(type(error)) as caught:
        checkpoint.load_newest(stage, fragments(0.0), World.single())
    assert caught.value is error or str(caught.value) == str(error), "and not five updates lost for it"


def test_an_outage_in_the_middle_of_reading_is_none_either(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = UnreachableError("step-00000010/rank-0.bin: failed after 6 attempts")
    monkeypatch.setattr(checkpoint_storage, "fill", broken("step-00000010/rank-0.bin", error, checkpoint_storage.fill))
    with pytest.raises(UnreachableError, match=r"step-00000010/rank-0\.bin: failed after 6 attempts"):
        checkpoint.load_newest(stage, fragments(0.0), World.single())


@pytest.mark.parametrize("name", ["meta.json", "index.json", "rank-0.json", "rank-0.bin"])
def test_a_damaged_file_of_any_kind_leads_to_the_checkpoint_before(stage: str, name: str) -> None:
    Path(stage, "checkpoints", "step-00000010", name).write_bytes(b"not what it was, and not so long")
    loaded = fragments(0.0)
    meta = checkpoint.load_newest(stage, loaded, World.single())
    assert meta is not None and meta["step"] == 5 and loaded["model/w"].tensor.tolist() == [5.0] * 8
    Path(stage, "checkpoints", "step-00000005", name).write_bytes(b"neither")
    with pytest.raises(CheckpointError):
        checkpoint.load_newest(stage, loaded, World.single())


@pytest.mark.parametrize(("name", "changed"), [("meta.json", {"step": 10}), ("index.json", {"start": 0}), ("rank-0.json", {"start": 0})])
def test_a_changed_figure_is_damage_though_it_is_json(stage: str, name: str, changed: dict[str, int]) -> None:
    file = Path(stage, "checkpoints", "step-00000010", name)
    ((key, value),) = changed.items()
    text = file.read_text()
    assert f'"{key}": {value}' in text
    file.write_text(text.replace(f'"{key}": {value}', f'"{key}": {value + 4}'))
    with pytest.raises(CheckpointError, match=rf"{name}: damaged: "):
        checkpoint.load(stage, 10, fragments(0.0))
    with pytest.raises(CheckpointError, match=rf"{name}: damaged: "):
        checkpoint.read_tensors(checkpoint.folder(stage, 10), "model")
    meta = checkpoint.load_newest(stage, fragments(0.0), World.single())
    assert meta is not None and meta["step"] == 5


def test_damaged_bytes_are_reported_where_one_process_reads_them(stage: str) -> None:
    Path(stage, "checkpoints", "step-00000010", "rank-0.bin").write_bytes(bytes(32))
    with pytest.raises(CheckpointError, match="damaged: the hash of bytes 0 to 32"):
        checkpoint.read_tensors(checkpoint.folder(stage, 10), "model")


@pytest.mark.parametrize("error", [MemoryError("no more"), RuntimeError("Connection closed by peer")])
@pytest.mark.parametrize("name", ["fill", "catalogue"])
def test_the_end_of_memory_or_of_another_rank_is_no_damage(stage: str, monkeypatch: pytest.MonkeyPatch, error: Exception, name: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(checkpoint_storage.Reader, name, fail)
    with pytest.raises(type(error), match=str(error)) as caught:
        checkpoint.load_newest(stage, fragments(0.0), World.single())
    assert not isinstance(caught.value, CheckpointError)


def left_alone(world: World, url: str) -> str:
    """What the main rank's load raises where the other one has gone."""
    dist.barrier()
    if not world.is_main:
        dist.destroy_process_group()
        return "left"
    with pytest.raises(Exception, match=r".") as caught:
        checkpoint.load(url, 10, fragments(0.0))
    dist.destroy_process_group()
    return type(caught.value).__name__ + f" {isinstance(caught.value, ReportedError)}"


def test_a_rank_that_dies_while_others_restore_is_no_damage(stage: str) -> None:
    alone, _ = run_in_ranks(left_alone, 2, stage)
    assert alone.endswith(" False"), alone


def test_a_save_that_fails_ends_with_its_cause_and_leaves_no_marker(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        save(stage, 15)
    monkeypatch.undo()
    refused = ConfigError("index.json: refused (AccessDenied)")
    monkeypatch.setattr(storage, "write_json", broken("index.json", refused, storage.write_json))
    with pytest.raises(ConfigError, match="AccessDenied") as caught:
        save(stage, 15)
    assert caught.value.exit_code == ExitCode.CONFIG
    assert checkpoint.complete(stage) == [5, 10]
