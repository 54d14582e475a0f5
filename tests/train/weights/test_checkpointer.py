"""The memory into which checkpoints are copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from infra.digests import digest
from infra.errors import CheckpointError
from infra.world import World
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import Fragment, even_slice


def test_copies_go_into_the_same_memory_until_a_tensor_has_another_shape_or_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is pinned where there is a GPU: taking it anew for each checkpoint would cost more than the copy."""
    written: list[torch.Tensor] = []

    def note(url: str, step: int, fragments: dict[str, Fragment], meta: Any, *rest: Any, **named: Any) -> None:
        written.append(fragments["model/w"].tensor)

    monkeypatch.setattr(checkpoint, "save", note)
    saver = Checkpointer(str(tmp_path), World.single(), keep=1)
    tensors = [
        torch.full((4,), 1.0),
        torch.full((4,), 2.0),
        torch.full((6,), 3.0),
        torch.full((6,), 4, dtype=torch.int16),
        torch.full((6,), 5, dtype=torch.int16),
    ]
    seen = []
    for step, tensor in enumerate(tensors):
        saver.save(step, {"model/w": even_slice(tensor, 0, 1)}, {})
        saver.wait()
        assert written[-1].equal(tensor) and written[-1].dtype == tensor.dtype and written[-1] is not tensor
        seen.append(written[-1].data_ptr())
    assert seen[0] == seen[1] and seen[3] == seen[4] and len(set(seen)) == 3


def test_saving_says_how_long_the_caller_waited_for_the_write_before(tmp_path: Path) -> None:
    saver = Checkpointer(str(tmp_path), World.single(), keep=1)
    fragments = {"model/w": even_slice(torch.ones(4), 0, 1)}
    assert 0 <= saver.save(1, fragments, {"shapes": {"w": [4]}}) < 5
    assert saver.settle() >= 0 and saver.settle() == 0.0
    saver.wait()
    saver.wait()
    assert checkpoint.complete(str(tmp_path)) == [1]
    assert 0 < saver.seconds < 60


def test_facts_of_another_type_are_refused_though_their_hash_is_right(tmp_path: Path) -> None:
    checkpoint.save(str(tmp_path), 1, {"model/w": even_slice(torch.ones(4), 0, 1)}, {"shapes": {"w": [4]}}, World.single(), 1)
    place = f"{checkpoint.folder(str(tmp_path), 1)}/meta.json"
    meta = storage.read_json(place)
    assert checkpoint.read_meta(checkpoint.folder(str(tmp_path), 1))["shapes"] == {"w": [4]}
    del meta["sha256"]
    meta["shapes"] = {"w": "four"}
    storage.write_json(place, meta | {"sha256": digest(meta)})
    with pytest.raises(CheckpointError, match=r"meta\.json: .*shapes"):
        checkpoint.read_meta(checkpoint.folder(str(tmp_path), 1))
