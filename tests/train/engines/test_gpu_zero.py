"""ZeRO on a GPU (``make gpu``): gradients of fp32 on a CPU, averages beside training, and no wait while a step is measured. Not yet seen there.

In this very process, whose group is the test's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from infra.world import World
from tests.support.gpu import DEVICE, NEEDS_GPU
from tests.train.engines.zero_cases import Case, backward, make_engine
from tests.train.engines.zero_reference import compare, judge

pytestmark = NEEDS_GPU


@pytest.fixture(scope="module")
def alone() -> Iterator[World]:
    """A process group of one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}.items():
            patch.setitem(os.environ, name, str(value))
        dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield World.single()
        dist.destroy_process_group()


CASES = [*(Case(stage=stage, precision="fp16", moments="16-bit") for stage in (2, 3, 1)), Case(stage=2, precision="fp16", offload=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"stage {case.stage}{', offloaded' if case.offload else ''}")
def test_the_engine_gives_the_gradients_of_fp32_on_a_cpu(alone: World, case: Case) -> None:
    judge(compare(alone, case, DEVICE), case)
    engine = make_engine(case, alone, device=DEVICE)
    expected = [flat.detach().to("cpu", copy=True) for flat in engine._masters()]  # offloaded ones are there already
    for step in range(4):  # numerics are counted at the second and the fourth
        backward(engine, alone, step, case.accumulation)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            engine.measure()  # nothing here may wait for the device
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert engine.step(1e-2).applied
        expected = [old.lerp(flat.detach().cpu(), 1 - engine.average.decay) for old, flat in zip(expected, engine._masters(), strict=True)]
    engine.average.wait()
    for i, value in enumerate(expected):
        assert float((engine.average.values[str(i)] - value).abs().max()) < 1e-6
