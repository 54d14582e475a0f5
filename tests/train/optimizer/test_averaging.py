"""Iterate averages: the formula, its turns, and tensors that change while they are mixed in."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from tests.support.patience import PATIENCE_S
from train.optimizer import averaging
from train.optimizer.averaging import Average


@pytest.mark.parametrize("on_cpu", [False, True])
def test_an_average_follows_the_formula_at_every_third_update(on_cpu: bool) -> None:
    p = torch.zeros(5)
    average = Average([("p", p)], 0.9, 3, on_cpu=on_cpu)
    expected = p.clone()
    for step in range(1, 12):
        average.before_step()
        p.copy_(torch.full((5,), float(step**2)))
        average.update(step)
        if step % 3 == 0:
            expected = 0.9 * expected + 0.1 * step**2
    average.wait()
    torch.testing.assert_close(average.values["p"], expected)
    assert float(p[0]) == 11**2


def test_the_next_step_waits_for_the_mixing_and_the_update_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, gate, mixed = averaging._mix, threading.Event(), list[bool]()

    def slow(*given: Any) -> None:
        mixed.append(gate.wait(PATIENCE_S))
        plain(*given)

    p = torch.ones(3)
    average = Average([("p", p)], 0.5, on_cpu=True)
    monkeypatch.setattr(averaging, "_mix", slow)
    p.fill_(3.0)
    average.update(1)
    assert not mixed
    threading.Timer(0.5, gate.set).start()
    average.before_step()
    assert mixed == [True]
    p.fill_(100.0)
    average.wait()
    assert average.values["p"].tolist() == [2.0] * 3
