"""The process group of a stage: what its end waits for. About 15 s."""

from __future__ import annotations

import os
import resource
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from infra.world import World
from tests.data_pipeline.loading.test_loaders import _free_port
from tests.support.ranks import run_in_ranks
from train.ranks import device


def end_late(world: World) -> float:
    """Seconds of a stage's end whose main rank works for longer than a collective may take."""
    dist.barrier()  # the group that is set up below waits 3 s for its ranks
    dist.destroy_process_group()  # the tests' own
    device._COLLECTIVE_TIMEOUT = timedelta(seconds=3)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, most), most))
    device.set_up(world)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most), "a group of 1,024 ranks needs more files than are usually allowed"
    began = time.monotonic()
    if world.is_main:
        time.sleep(6)
    device.wait_for_all()
    device.leave_group()
    return time.monotonic() - began


def test_the_end_of_a_stage_waits_for_the_main_rank_longer_than_a_collective(monkeypatch: pytest.MonkeyPatch) -> None:
    with _free_port() as port:
        monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
        monkeypatch.setitem(os.environ, "MASTER_PORT", str(port))
        assert min(run_in_ranks(end_late, 2)) > 3.5
