"""The benchmark of the code loader, in small."""

from __future__ import annotations

import json
from typing import Any

import pytest

from train.bench import data_codes
from train.bench.docs import check
from train.bench.harness import to_json
from train.machine.rates import Options


def test_the_benchmark_measures_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Any] = []
    monkeypatch.setattr(data_codes, "RECORDS", 150)
    monkeypatch.setattr(data_codes, "BATCH", 50)
    monkeypatch.setattr(data_codes, "make_set", lambda folder, records=0, grid=4: make_set(folder, 150, 4))
    monkeypatch.setattr(data_codes, "training_step", lambda *shapes: lambda: steps.append(shapes))
    monkeypatch.setenv("RANK", "3")  # of whoever started it
    found = data_codes.run(Options("cpu", seconds=0.01, runs=1))
    check(json.loads(to_json(found)))
    rates = [found.measured[name].value for name in ("untokenised", "tokenised", "tokenised with BPE dropout")]
    assert sorted(rates, reverse=True) == rates and found.floor["reading the same bytes"].value > rates[0]
    assert 5 < found.measured["memory of a worker"].value < 500
    assert len(steps) >= 16 and 0 < found.measured["waiting, share of a step, 0 workers"].value <= 100
    assert {"untokenised, through a worker process", "waiting, share of a step, 1 workers", "demo transformer"} <= set(found.measured)


make_set = data_codes.make_set
