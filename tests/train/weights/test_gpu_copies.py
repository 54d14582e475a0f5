"""Copies of a checkpoint's tensors on a GPU (``make gpu``): beside what it does, with no wait of the host. Not yet seen there."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from infra.world import World
from tests.support.gpu import DEVICE, NEEDS_GPU
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import even_slice

pytestmark = NEEDS_GPU
COUNT = 1 << 24


def test_a_gpus_tensors_are_copied_beside_what_it_does_and_the_host_waits_for_nothing(tmp_path: Path) -> None:
    live = {"model/w": even_slice(torch.zeros(COUNT, device=DEVICE), 0, 1)}
    saver = Checkpointer(str(tmp_path), World.single(), keep=3)
    for step in (1, 2, 3):  # the first takes pinned memory, which the others use again
        live["model/w"].tensor.fill_(float(step))
        if DEVICE == "cuda":
            torch.cuda._sleep(1 << 30)  # half a second's work on the GPU, in which the host goes on
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            began = time.perf_counter()
            saver.save(step, live, {"shapes": {"w": [COUNT]}})
            saver.settle()
            live["model/w"].tensor.fill_(-1.0)  # training goes on, after the copy
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert step == 1 or DEVICE != "cuda" or time.perf_counter() - began < 0.2
        saver.wait()
        assert set(checkpoint.read_tensors(checkpoint.folder(str(tmp_path), step), "model")["w"].tolist()) == {float(step)}
