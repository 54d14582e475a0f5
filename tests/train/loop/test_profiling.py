"""Profiles of chosen updates, and ranks that keep others waiting: two ranks of a toy, and a real stage with and without. About 25 s."""

from __future__ import annotations

import gzip
import json
import logging
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from infra import storage
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.ranks import run_in_ranks
from tests.support.stopped_run import FIXTURE, STEPS, losses, run_stage
from tests.train.loop.test_trainer import APPLIED, Counting, Nothing, Scripted
from train.config import FitSection, load_run
from train.loop import gantt, phases, stragglers
from train.loop.metrics import read_metrics
from train.loop.phases import Phases
from train.loop.profiling import set_by_message
from train.loop.stragglers import IN_A_ROW, LASTS_S, Stragglers, slow
from train.loop.trainer import Trainer
from train.loop.watching import speed_of_median
from train.weights.fragments import even_slice

UPDATES = 12


class Slow(Nothing):
    """A loader whose batches come late."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def next(self) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {"ids": []}


def toy(world: World, folder: str) -> tuple[list[float], list[str]]:
    """A run of two ranks of which the second is slow; what was gathered of each, and what was said."""
    said: list[str] = []
    stragglers.LASTS_S = 0.0  # in this rank's own process

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("train").addHandler(Keeps())
    section = FitSection(steps=UPDATES, save_every=5, eval_every=100, log_every=2, profile=(4, 5), profile_ranks=(1,))
    engine: Any = Scripted([APPLIED] * UPDATES)
    engine.fragments = lambda to_load: {
        f"model/{name}": even_slice(p.detach(), world.rank, world.size) for name, p in engine.module.named_parameters()
    }
    loader = Slow(0.15 if world.rank == 1 else 0.0)
    fit = Trainer("toy", Counting([1.0]), engine, loader, section, RunFolder(folder), world, StopFlag(), torch.device("cpu"))
    fit.run_to_end()
    return fit._vector.own_s, said


def test_a_slow_rank_is_named_by_what_travels_with_the_step_s_message_and_profiles_show_who_waits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (own_0, said), (own_1, others) = run_in_ranks(toy, 2, str(tmp_path))
    assert not re.search("profiler_start|gpuGetDeviceCount", capfd.readouterr().err), "words of the profiler's library, in C++"
    assert own_0 == own_1 and len(own_0) == 2 and own_0[1] > 0.15 > own_0[0]
    lines = [line for line in said if "is slow" in line]
    assert len(lines) == 1 and re.match(r"toy: rank 1 is slow: its own work takes \d+\.\d times the median of 2 ranks, and all wait for it", lines[0])
    assert not [line for line in others if "is slow" in line]
    ratios = read_metrics(str(tmp_path), "toy")["perf/slowest_rank_over_median"]
    assert [point.step for point in ratios] == list(range(2, UPDATES + 1, 2)) and min(point.value for point in ratios[1:]) > 1.5
    place = tmp_path / "toy" / "profile"
    assert sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()) == [
        "gantt.html",
        "phases.json",
        "update-00000004/trace-rank-1.json.gz",
        "update-00000005/trace-rank-1.json.gz",
    ]
    gathered = gantt.read(json.loads((place / "phases.json").read_text()))
    assert list(gathered) == [4, 5] and [len(ranks) for ranks in gathered.values()] == [2, 2]
    waits, works = (gantt.sums(parts) for parts in gathered[4])
    assert works["data"] > 0.15 > waits["data"] and waits["reduce"] > 0.1 > works["reduce"], "rank 0 waits for what rank 1 waits for"
    assert all(any(name == "save" and end - begin > 0 for name, begin, end in parts) for parts in gathered[5]), "the save of update 5"
    ends = [max(end for name, _, end in parts if name == "reduce") for parts in gathered[4]]
    assert ends == [0.0, 0.0], "clocks are set by the message"
    page = (place / "gantt.html").read_text()
    assert page.count("<svg") == 2 and page.count(">rank 1</text>") == 2 and "Update 4: " in page
    assert not re.search(r"(src|href)=|@import|url\(", page), "it opens offline"


def test_a_profiled_stage_computes_the_same_bits_also_where_it_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("plain", "profiled"):
        shutil.copytree(FIXTURE / "run", tmp_path / name)
    plain, profiled = (RunFolder(str(tmp_path / name)) for name in ("plain", "profiled"))
    run_stage("clip", [plain.url])
    run_stage("clip", [profiled.url, "clip_fit.profile=[3,6,7]", "clip_fit.lines_every=1"])
    assert losses(profiled.url, "clip") == losses(plain.url, "clip") and max(losses(plain.url, "clip")) == STEPS
    weights = [storage.read_json(run.at("clip", "export", "config.json"))["content_hash"] for run in (plain, profiled)]
    assert weights[0] == weights[1]
    assert "clip_fit.profile names updates that are past: 3; the next is 5" in caplog.text
    place = Path(profiled.at("clip", "profile"))
    assert sorted(path.name for path in place.iterdir()) == ["gantt.html", "phases.json", "update-00000006", "update-00000007"]
    # Of two traces, and no operator by name: in a process that other tests have used, the profiler leaves out some of them.
    traces = [json.loads(gzip.decompress((place / f"update-0000000{step}" / "trace-rank-0.json.gz").read_bytes())) for step in (6, 7)]
    operators = {event["name"] for trace in traces for event in trace["traceEvents"] if event.get("cat") == "cpu_op"}
    assert len(operators) > 10 and any("Backward" in name for name in operators), sorted(operators)
    assert not Path(plain.at("clip", "profile")).exists(), "off by default"
    assert load_run(profiled.url, []).clip_fit.profile == (3, 6, 7), "a run goes on with another value"


def test_slow_ranks_are_those_far_over_the_median_and_not_for_nothing() -> None:
    assert slow([1.0, 1.0, 1.0, 2.0, 5.0]) == [(4, 5.0), (3, 2.0)]
    assert slow([1.0, 2.0]) == [(1, 2.0)] and slow([1.0]) == [] and slow([0.001, 0.005, 0.001]) == [], "milliseconds"
    assert slow([1.0] * 1023 + [1.4]) == []


def test_a_rank_that_is_slow_for_long_is_said_once_and_one_slow_spell_is_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(stragglers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    found = Stragglers("dvae", 3, every=2)
    assert not found.observe([1.0, 1.0, 9.0]) and found.observe([1.0, 1.0, 9.0]) and found.found == [(2, 9.0)] and found.slowest == 9.0
    for _ in range(2):
        found.observe([1.0, 1.0, 1.0])
    assert found.found == []
    for _ in range(2 * (IN_A_ROW + 2)):
        found.observe([1.0, 3.0, 1.0])
    assert not caplog.text, "of updates of milliseconds, three looks are no time"
    for _ in range(2 * (IN_A_ROW + 2)):
        now[0] += LASTS_S / 2
        found.observe([1.0, 3.0, 1.0])
    assert caplog.text.count("rank 1 is slow: its own work takes 3.0 times") == 1 and "rank 2" not in caplog.text


def test_own_work_is_fetching_and_forward_passes() -> None:
    clock = Phases(torch.device("cpu"))
    assert clock.own_s() == 0.0, "before the first update"
    clock.begin(time.perf_counter())
    for name in ("data", "reduce", "forward", "backward", "reduce", "save", "step"):
        time.sleep(0.01 if name in ("data", "forward") else 0.05)
        clock.forward_ended() if name == "forward" else clock.ended(name)
    assert 0.02 <= clock.own_s() < 0.05 and [name for name, *_ in clock.parts].count("reduce") == 2
    assert set(gantt.COLOURS) == set(phases.NAMES) == {name for name, *_ in clock.parts}
    assert max(end for name, _, end in set_by_message(clock.parts) if name == "reduce") == 0.0


def test_speed_is_told_by_its_own_median() -> None:
    from collections import deque

    assert speed_of_median(deque([2.0] * 50)) == pytest.approx(1.0)
    assert speed_of_median(deque([2.0] * 50 + [1.0] * 10)) == pytest.approx(0.5)
