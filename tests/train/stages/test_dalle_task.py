"""Evaluation of the transformer: whose caption a picture is shown with, on any number of ranks; and what a rank that fails does not wait for. About 20 s."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infra.digests import id_hash
from infra.errors import DataError
from infra.world import World
from tests.support.ranks import run_in_ranks
from train.config import load_run
from train.engines.zero.engine import ZeroEngine
from train.ranks.leaving import Left
from train.stages.dalle_task import DalleTask, cross_entropies

CPU = torch.device("cpu")
SAMPLES = 7


def batches_of(world: World, size: int) -> list[dict[str, Any]]:
    """This rank's of seven samples; the caption of each is its number."""
    mine = list(range(SAMPLES))[world.rank :: world.size]
    groups = [mine[start : start + size] for start in range(0, len(mine), size)]
    return [
        {
            "ids": [f"sample {index}" for index in group],
            "text": torch.tensor([[index, index] for index in group]),
            "lengths": torch.tensor([index % 3 for index in group]),
            "codes": torch.tensor([[index] for index in group]),
        }
        for group in groups
    ]


def evaluated(world: World) -> tuple[dict[int, int], dict[str, float]]:
    """Whose caption each sample was shown with, and the figures of a loss that is known."""
    shown: dict[int, int] = {}

    def losses(text_BT: torch.Tensor, lengths_B: torch.Tensor, codes_BI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert lengths_B.tolist() == [text % 3 for text in text_BT[:, 0].tolist()], "a caption comes with its own length"
        for code, text in zip(codes_BI[:, 0].tolist(), text_BT[:, 0].tolist(), strict=True):
            shown[code] = text if text != code else shown.get(code, -1)
        return text_BT.float(), (text_BT[:, :1] - codes_BI).abs().float() + 1

    found = cross_entropies(losses, batches_of(world, 2), CPU, lambda lengths_B: lengths_B)
    return {code: text for code, text in shown.items() if code % world.size == world.rank}, found


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_picture_is_shown_with_the_caption_that_follows_in_the_order_of_hashes_on_any_number_of_ranks(size: int) -> None:
    """On eight ranks each has one sample, and the last has none."""
    order = sorted(range(SAMPLES), key=lambda index: id_hash(f"sample {index}"))
    followers = {index: order[(place + 1) % SAMPLES] for place, index in enumerate(order)}
    found = [evaluated(World.single())] if size == 1 else run_in_ranks(evaluated, size)
    assert {code: text for shown, _ in found for code, text in shown.items()} == followers
    gain = sum(abs(index - other) for index, other in followers.items()) / SAMPLES
    for _, figures in found:
        assert figures["loss_image"] == 1.0 and figures["caption_gain"] == pytest.approx(gain) and gain > 1


class Stateful:
    """What makes an engine one with a state, none of which an evaluation asks for."""

    def measure(self) -> None: ...
    def step(self) -> None: ...
    def restore(self) -> None: ...
    def state(self) -> None: ...
    def more_to_load(self) -> None: ...


def test_what_cannot_be_read_is_an_error_before_the_ranks_exchange_weights() -> None:
    class Validation:
        def __iter__(self) -> Iterator[Any]:
            raise DataError("part-00003: damaged")

    class Engine(Stateful):
        def averaged(self) -> Any:
            pytest.fail("the other ranks wait in a collective")

    task = DalleTask(load_run("tiny", []), CPU, SimpleNamespace(), Validation())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="damaged"):
        task.evaluate(Engine(), 1, None)  # type: ignore[arg-type]


def test_an_evaluation_that_is_left_gives_the_training_its_weights_back() -> None:
    swaps: list[str] = []

    class Engine(Stateful):
        @contextmanager
        def averaged(self) -> Iterator[None]:
            swaps.append("in")
            yield
            swaps.append("out")

    def between() -> None:
        assert swaps == ["in"]
        raise Left

    batch = {
        "ids": ["a"],
        "codes": torch.zeros(1, 4, dtype=torch.int64),
        "text": torch.zeros(1, 3, dtype=torch.int64),
        "lengths": torch.ones(1, dtype=torch.int64),
    }
    model = SimpleNamespace(shape=SimpleNamespace(grid=2), text_counts=lambda lengths: lengths)
    task = DalleTask(load_run("tiny", []), CPU, model, [batch])  # type: ignore[arg-type]
    with pytest.raises(Left):
        task.evaluate(Engine(), 1, None, between)  # type: ignore[arg-type]
    assert swaps == ["in", "out"]


def test_after_an_error_an_engine_exchanges_no_weights_with_ranks_that_have_met_none() -> None:
    swaps: list[str] = []
    engine = SimpleNamespace(_swap=lambda: swaps.append("swap"), _engine=SimpleNamespace(eval=lambda: None, train=lambda: None))
    averaged = contextmanager(ZeroEngine.averaged.__wrapped__)  # type: ignore[attr-defined]
    with averaged(engine):
        pass
    assert swaps == ["swap"] * 2
    with pytest.raises(ZeroDivisionError), averaged(engine):
        1 / 0  # noqa: B018
    assert swaps == ["swap"] * 3
