"""Small contracts: seeds, the signal vector, schedules, the root cause of an attempt, gathering of embeddings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from infra.run_folder import RunFolder
from infra.seeds import derive, generator
from infra.world import World
from tests.support.contrastive import contrastive_loss
from tests.support.ranks import run_in_ranks
from train.loop.schedules import half_cosine, warmup_cosine
from train.ranks.signal_vector import SignalVector


def test_seeds_depend_on_every_counter_and_on_nothing_else() -> None:
    base = derive(0, "crop", 3, "a")
    assert base == derive(0, "crop", 3, "a") == 10933885446893340
    others = [
        derive(1, "crop", 3, "a"),
        derive(0, "gumbel", 3, "a"),
        derive(0, "crop", 4, "a"),
        derive(0, "crop", 3, "b"),
        derive(0, "crop", "3", "a"),
    ]
    assert len({base, *others}) == 6
    assert generator(0, "crop", 1).random() == generator(0, "crop", 1).random() != generator(0, "crop", 2).random()


@given(st.integers(0, 2**32), st.integers(0, 10**9), st.text(max_size=20))
def test_seeds_fit_63_bits(seed: int, step: int, name: str) -> None:
    assert 0 <= derive(seed, "sample", step, name) < 2**63


def test_schedules_pass_through_the_papers_values() -> None:
    assert [round(half_cosine(t, 0.0, 6.6, 5000), 3) for t in (0, 1250, 2500, 3750, 5000, 9999)] == [0.0, 0.967, 3.3, 5.633, 6.6, 6.6]
    assert [half_cosine(t, 1.0, 1 / 16, 150_000) for t in (37_500, 75_000, 112_500)] == pytest.approx([0.8627, 0.53125, 0.1998], abs=1e-4)
    assert [f"{half_cosine(t, 1e-4, 1.25e-6, 1_200_000):.4g}" for t in (300_000, 600_000, 900_000)] == ["8.554e-05", "5.063e-05", "1.571e-05"]
    assert warmup_cosine(0, 1.0, 0.0, 10, 110) == 0.1 and warmup_cosine(9, 1.0, 0.0, 10, 110) == 1.0
    assert math.isclose(warmup_cosine(60, 1.0, 0.0, 10, 110), 0.5) and warmup_cosine(110, 1.0, 0.25, 10, 110) == 0.25


def exchange_and_gather(world: World) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    agreed = SignalVector(("loss",), torch.device("cpu")).exchange({"stop": float(world.rank == 1), "loss": torch.tensor(0.25 * (world.rank + 1))})
    from train.stages.clip_task import _gather

    torch.manual_seed(0)
    whole_AE = torch.randn(6, 4)
    local_BE = whole_AE.chunk(world.size)[world.rank].clone().requires_grad_()
    image_BE, text_BE = F.normalize(local_BE, dim=1), F.normalize(local_BE.roll(1, 1), dim=1)
    target_B = torch.arange(len(local_BE)) + world.rank * len(local_BE)
    scores = 5.0 * image_BE @ _gather(text_BE, world).T, 5.0 * text_BE @ _gather(image_BE, world).T
    loss = sum(F.cross_entropy(part, target_B, reduction="sum") for part in scores) / (2 * len(whole_AE))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert local_BE.grad is not None
    return agreed, loss.detach(), local_BE.grad


def test_one_ranks_wish_reaches_all_and_gathered_gradients_are_those_of_one_process() -> None:
    results = run_in_ranks(exchange_and_gather, 2)
    for agreed, _, _ in results:
        assert agreed == {"stop": 1.0, "non_finite": 0.0, "heartbeat": 2.0, "step_time_s": 0.0, "loss": 0.75}
    torch.manual_seed(0)
    whole_AE = torch.randn(6, 4).requires_grad_()
    image_AE, text_AE = F.normalize(whole_AE, dim=1), F.normalize(whole_AE.roll(1, 1), dim=1)
    loss = contrastive_loss(image_AE, text_AE, torch.tensor(5.0))
    loss.backward()
    assert sum(part for _, part, _ in results).item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in results]), whole_AE.grad, rtol=1e-4, atol=1e-6)


def test_a_value_without_a_slot_is_refused() -> None:
    with pytest.raises(KeyError, match="no slot for wish; slots: stop, non_finite"):
        SignalVector((), torch.device("cpu")).exchange({"wish": 1.0})


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], (0, "finished")),
        ([75, 75], (75, "reason 0")),
        ([1, 65], (65, "rank 1: reason 1")),  # the peer's crash came first, but says less
        ([93, 78], (93, "rank 0: reason 0")),
        ([75, 1], (1, "rank 1: reason 1")),
        ([75, None], (1, "rank 1 ended without a record: it was killed")),
        ([None, 65], (65, "rank 1: reason 1")),
    ],
)
def test_the_root_cause_is_the_earliest_code_that_says_something(tmp_path: Path, codes: list[int | None], expected: tuple[int, str]) -> None:
    run = RunFolder(str(tmp_path))
    attempt = run.begin_attempt("dvae")
    for rank, code in enumerate(codes):
        if code is not None:
            run.record_exit("dvae", attempt, rank, code, f"reason {rank}")
    assert run.root_cause("dvae", attempt, 2) == expected
    assert run.begin_attempt("dvae") == attempt + 1
