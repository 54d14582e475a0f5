"""Checkpoints that several ranks write and other numbers of ranks read, on a disk and on S3; ranks that fail or are killed meanwhile. Real ranks; about 45 s."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra import storage
from infra.errors import CheckpointError, NoRoomError
from infra.world import World
from tests.support.ranks import run_in_ranks
from train.weights import checkpoint, checkpoint_storage
from train.weights.fragments import Fragment, even_slice

SIZES = {"model/a": 1000, "model/b": 7, "average/a": 1000, "optimizer/c": 333}


def whole(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.arange(float(size)) + 1000 * step for name, size in SIZES.items()}


def fragments(world: World, step: int, *, uneven: bool = False) -> dict[str, Fragment]:
    """An even cut; or whole tensors on one rank each, as stages 1 and 2 have them, with one that lies on two."""
    if not uneven:
        return {name: even_slice(tensor, world.rank, world.size) for name, tensor in whole(step).items()}
    found = {name: even_slice(tensor, 0, 1) for place, (name, tensor) in enumerate(whole(step).items()) if place % world.size == world.rank}
    if world.rank < 2:
        tensor = whole(step)["model/a"]
        found["model/a"] = Fragment(tensor[:300], 0, 1000) if world.rank else Fragment(tensor[300:], 300, 1000)
    return found


def save(world: World, folder: str, step: int) -> list[str]:
    """Files of the checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_storage, "PIECE_BYTES", 256)
        url = checkpoint.save(folder, step, fragments(world, step, uneven=step % 2 == 1), {"shapes": {}}, world, keep=9)
    if world.size > 1:
        dist.barrier()
    return storage.list_files(url)


def load(world: World, folder: str, step: int) -> list[str]:
    """Parts of the index that this rank read; what it restored is right."""
    plain, read = storage.read_at_most, list[str]()

    def noted(url: str, most: int) -> bytes:
        read.append(url.rpartition("/")[2])
        return plain(url, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_at_most", noted)
        target = {name: even_slice(torch.zeros(size), world.rank, world.size) for name, size in SIZES.items()}
        meta = checkpoint.load_newest(folder, target, world)
    assert meta is not None and meta["step"] == step
    for name, tensor in whole(step).items():
        assert torch.equal(target[name].tensor, even_slice(tensor, world.rank, world.size).tensor), name
    return sorted(name for name in read if name.startswith("rank-"))


def save_and_load(world: World, folder: str) -> list[list[str]]:
    found = []
    for step in (1, 2):
        save(world, folder, step)
        found.append(load(world, folder, step))
    return found


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_two_ranks_write_and_two_three_or_one_read(tmp_path: Path, request: pytest.FixtureRequest, place: str) -> None:
    folder = str(tmp_path) if place == "disk" else str(request.getfixturevalue("s3"))
    same = run_in_ranks(save_and_load, 2, folder)
    assert [parts[1] for parts in same] == [["rank-0.json"], ["rank-1.json"]], "the even cut: each its own"
    assert same[0][0] == ["rank-0.json", "rank-1.json"], "tensors that lay elsewhere"
    assert run_in_ranks(load, 3, folder, 2) == [["rank-0.json"], ["rank-0.json", "rank-1.json"], ["rank-1.json"]]
    assert load(World.single(), folder, 2) == ["rank-0.json", "rank-1.json"]


def test_a_checkpoint_that_is_written_anew_in_the_attempt_that_read_it_is_read_as_it_is_now(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the last one was damaged: the run falls back, makes it anew, and exports it; the node still has its copy of the old index and part."""
    monkeypatch.setenv("LAUNCHER_NODE_FOLDER", str(tmp_path))
    for value in (1.0, 2.0):
        checkpoint.save(s3, 2, {"model/w": even_slice(torch.full((100,), value), 0, 1)}, {"shapes": {"w": [100]}}, World.single(), keep=9)
        target = torch.zeros(100)
        checkpoint.load(s3, 2, {"model/w": even_slice(target, 0, 1)})
        assert target.tolist() == [value] * 100


def test_four_ranks_write_and_one_reads(tmp_path: Path) -> None:
    names = ["index.json", "meta.json", *(f"rank-{rank}.{kind}" for rank in range(4) for kind in ("bin", "json"))]
    assert run_in_ranks(save, 4, str(tmp_path), 2) == [names] * 4
    assert load(World.single(), str(tmp_path), 2) == [f"rank-{rank}.json" for rank in range(4)]


def fails(world: World, folder: str, what: str) -> str:
    """What a save raises where one rank cannot write a file."""
    plain = storage.write_bytes

    def full(url: str, data: bytes) -> None:
        if url.endswith(what):
            raise NoRoomError(f"{url}: no room")
        plain(url, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(NoRoomError) as caught:
        patch.setattr(storage, "write_bytes", full)
        save(world, folder, 3)
    return str(caught.value).rpartition("/")[2]


def gap(world: World, folder: str) -> str:
    own = {} if world.rank == 1 else fragments(world, 4)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(folder, 4, own, {"shapes": {}}, world, keep=9)
    return str(caught.value)


def fails_and_gap(world: World, folder: str) -> list[str]:
    return [*(fails(world, folder, name) for name in ("rank-1.json", "index.json")), gap(world, folder)]


def test_what_one_rank_meets_all_raise_and_there_is_no_marker(tmp_path: Path) -> None:
    words = ["rank-1.json: no room", "index.json: no room", "'average/a' has elements 500 to 1000 on no rank: no checkpoint can be written of it."]
    assert run_in_ranks(fails_and_gap, 2, str(tmp_path)) == [words] * 2
    assert checkpoint.complete(str(tmp_path)) == [] and not Path(checkpoint.folder(str(tmp_path), 4)).exists(), (
        "the gap is found before anything is written"
    )


def killed(world: World, folder: str, name: str) -> None:
    """A save in which the rank that writes this file is killed in the middle of it."""
    plain = storage.write_bytes

    def kill(url: str, data: bytes) -> None:
        if url.endswith(name):
            Path(url).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        plain(url, data)

    storage.write_bytes = kill
    save(world, folder, 10)


@pytest.mark.parametrize("name", ["rank-1.json", "index.json"])
def test_a_kill_in_the_middle_of_a_part_or_the_index_leaves_the_checkpoint_before_and_what_is_left_is_written_over(tmp_path: Path, name: str) -> None:
    run_in_ranks(save, 2, str(tmp_path), 8)
    with pytest.raises(AssertionError):
        run_in_ranks(killed, 2, str(tmp_path), name)
    assert Path(checkpoint.folder(str(tmp_path), 10), name).exists() and checkpoint.complete(str(tmp_path)) == [8]
    assert load(World.single(), str(tmp_path), 8)
    save(World.single(), str(tmp_path), 10)
    assert load(World.single(), str(tmp_path), 10) == ["rank-0.json"], "the other rank's files are not asked for"


def corrupted(world: World, folder: str) -> tuple[str, int]:
    """What all ranks say of a checkpoint of which one rank alone sees the damage, and what they fall back to."""
    for step in (2, 4):
        save(world, folder, step)
    if world.is_main:
        Path(checkpoint.folder(folder, 4), "rank-1.json").write_bytes(b"{}")
    dist.barrier()
    target: dict[str, Any] = {name: even_slice(torch.zeros(size), world.rank, world.size) for name, size in SIZES.items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, 4, target)
    meta = checkpoint.load_newest(folder, target, world)
    assert meta is not None
    return str(caught.value).rpartition("/")[2], int(meta["step"])


def test_a_corrupted_part_leads_all_ranks_to_the_checkpoint_before(tmp_path: Path) -> None:
    words = "rank-1.json: damaged: its hash is not the one in index.json, also when it is read again."
    assert run_in_ranks(corrupted, 2, str(tmp_path)) == [(words, 2)] * 2
