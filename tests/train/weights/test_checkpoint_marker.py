"""A checkpoint that is written again: no rank begins with it while its old marker still says that it is whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from infra import storage
from infra.world import World
from tests.support.ranks import run_in_ranks
from train.weights import checkpoint, checkpoint_storage
from train.weights.fragments import Fragment, even_slice


def written_again(world: World, folder: str) -> bool:
    """Whether this rank found the marker of the first writing when it began with the second: collectives may hold it up later on, or not."""
    seen: list[bool] = []
    delete, write = storage.delete, checkpoint_storage.Writer.write

    def slowly(url: str) -> None:
        time.sleep(0.5)  # the other rank would be far ahead
        delete(url)

    def watched(writer: checkpoint_storage.Writer, fragments: Mapping[str, Fragment]) -> None:
        seen.append(Path(checkpoint.folder(folder, 1), checkpoint.META).exists())
        write(writer, fragments)

    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            fragments = {"model/w": even_slice(torch.ones(8), world.rank, world.size)}
            checkpoint.save(folder, 1, fragments, {"shapes": {"w": [8]}}, world, keep=1)
            dist.barrier()  # the marker is there, on every rank
            patch.setattr(storage, "delete", slowly)
            patch.setattr(checkpoint_storage.Writer, "write", watched)
    assert len(seen) == 1
    return seen[0]


def test_the_marker_of_a_checkpoint_that_is_written_again_goes_before_any_rank_writes(tmp_path: Path) -> None:
    assert run_in_ranks(written_again, 2, str(tmp_path)) == [False, False]
    assert checkpoint.complete(str(tmp_path)) == [1]
