"""Progress lines, rates and tables, with a clock and streams of our own. Seconds: < 1."""

import io
import json
import re
from pathlib import Path

import pytest

from infra import live, output
from infra.progress import Progress, duration, table, three_digits


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make(total: int = 100, every_s: float = 10.0, start: int = 0, enabled: bool = True) -> tuple[Progress, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return Progress(total, "dvae", every_s=every_s, start=start, enabled=enabled, stream=stream, clock=clock), stream, clock


def test_a_log_gets_the_line_of_the_contract() -> None:
    bar, stream, clock = make(total=1500)
    clock.now += 10
    bar.update(81, loss=0.412)
    assert stream.getvalue() == "dvae  81/1500 steps  8.1 steps/s  ETA 2:55  loss 0.412\n"


def test_a_log_gets_one_line_for_each_interval_and_not_one_for_each_step() -> None:
    bar, stream, clock = make()
    for step in range(1, 61):
        clock.now += 0.5
        bar.update(step)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/100", "21/100", "41/100"]


def test_a_log_gets_a_line_for_each_so_many_updates_with_the_time_of_day(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAUNCHER_JOB", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    stream, clock = io.StringIO(), Clock()
    bar = Progress(100, "dvae", every=4, timed=True, stream=stream, clock=clock)
    for step in range(1, 10):
        clock.now += 100
        bar.update(step, loss=1.0, skipped=2)
    lines = stream.getvalue().splitlines()
    assert [line.split()[2] for line in lines] == ["1/100", "4/100", "8/100"]
    assert re.fullmatch(r"dvae  \d\d:\d\d:\d\d  8/100 steps  0\.01 steps/s  ETA .*  loss 1  skipped 2", lines[-1])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert re.match(r"dvae  \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  9/100 steps", bar.line()), "read elsewhere, and later"


def test_every_rank_says_how_far_it_is_and_the_main_one_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(live.VARIABLE, str(tmp_path))
    monkeypatch.setattr(live, "LEAST_S", 0.0)
    live.begin(3)
    bar, stream, clock = make(enabled=False)
    clock.now += 20
    bar.update(5)
    bar.finish()
    live.end()
    said = json.loads((tmp_path / "rank-3").read_text())
    assert (said["rank"], said["title"], said["done"], said["total"], said["unit"]) == (3, "dvae", 5, 100, "steps") and said["rate"] == 0.25
    assert stream.getvalue() == ""


def test_a_terminal_s_bar_is_kept_in_the_copy_of_a_rank_s_words_as_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output.copy_to(tmp_path / "rank-0.log")
    try:
        bar = Progress(100, "dvae", stream=Terminal(), clock=(clock := Clock()))
        for step in range(1, 9):
            clock.now += 6
            bar.update(step)
        bar.finish()
    finally:
        output.copy_no_more()
    assert [line.split()[1] for line in (tmp_path / "rank-0.log").read_text().splitlines()] == ["1/100", "3/100", "5/100", "7/100"]


def test_the_last_line_says_what_was_done_and_how_long_it_took_and_nothing_follows() -> None:
    bar, stream, clock = make()
    clock.now += 50
    bar.update(100, loss=1.0)
    bar.finish()
    bar.finish()
    bar.update(101)
    assert stream.getvalue().splitlines()[-1] == "dvae  100/100 steps  2 steps/s  took 0:50  loss 1"
    assert len(stream.getvalue().splitlines()) == 2


def test_steps_of_an_earlier_attempt_count_as_done_but_not_towards_the_rate() -> None:
    bar, stream, clock = make(total=100, start=80)
    clock.now += 10
    bar.update(90)
    assert bar.rate() == 1.0
    assert bar.eta_s() == 10.0
    bar.finish()
    assert "90/100 steps  1 steps/s  took 0:10" in stream.getvalue()


def test_the_rate_forgets_what_happened_more_than_a_minute_ago() -> None:
    bar, _, clock = make(total=10_000)
    for step in range(1, 11):
        clock.now += 60
        bar.update(step)
    for step in range(1, 601):
        clock.now += 1
        bar.update(10 + 10 * step)
    assert abs(bar.rate() - 10.0) < 1e-9


def test_a_slow_first_update_promises_no_end_and_spoils_no_later_rate() -> None:
    bar, stream, clock = make(total=1500)
    clock.now += 20  # data, memory, compilation
    bar.update(1)
    assert stream.getvalue() == "dvae  1/1500 steps\n", "not 8:20:00"
    for step in range(2, 83):
        clock.now += 0.125
        bar.update(step)
    assert stream.getvalue().splitlines()[-1] == "dvae  81/1500 steps  8 steps/s  ETA 2:57"


def test_the_end_is_a_range_until_the_rate_is_stable() -> None:
    bar, _, clock = make(total=1000)
    clock.now += 1
    bar.update(1)
    for step in range(2, 22):
        clock.now += 0.1
        bar.update(step)
    low, high = bar.eta_range_s() or (0.0, 0.0)
    assert abs(low - 97.9 / 1.5) < 0.1 and abs(high - 97.9 * 1.5) < 0.1, "two seconds watched"
    assert "ETA 1:05 to 2:27" in bar.line()
    for step in range(22, 122):
        clock.now += 0.1 if step < 72 else 0.4
        bar.update(step)
    low, high = bar.eta_range_s() or (0.0, 0.0)
    assert round(low) == 88 and round(high) == 352, "a load that came: as fast as before, or as slow as now"
    assert "ETA 1:28 to 5:52" in bar.line()


def test_nothing_is_claimed_before_anything_is_known() -> None:
    bar, stream, _ = make()
    bar.update(0)
    assert bar.eta_s() is None
    assert stream.getvalue() == "dvae  0/100 steps\n"


def test_an_unknown_total_shows_the_count_and_no_eta() -> None:
    bar, stream, clock = make(total=0)
    clock.now += 1
    bar.update(5)
    assert stream.getvalue() == "dvae  5 steps  5 steps/s\n"


def test_fields_stay_until_they_are_replaced() -> None:
    bar, _, _ = make()
    bar.update(1, loss=2.0, psnr=18.0)
    bar.update(2, loss=1.0)
    assert bar.line().endswith("loss 1  psnr 18")


def test_a_rank_that_is_not_main_writes_nothing() -> None:
    bar, stream, clock = make(enabled=False)
    clock.now += 20
    bar.update(5)
    bar.finish()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_same_words() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(1500, "dvae", stream=stream, clock=clock) as bar:
        clock.now += 10
        bar.update(81, loss=0.412)
        shown = stream.getvalue()
    assert "81/1500 steps  8.1 steps/s  ETA 2:55  loss 0.412" in shown
    assert "\x1b[" in shown and "━" in shown


def test_a_terminal_is_not_redrawn_for_every_fast_step() -> None:
    stream, clock = Terminal(), Clock()
    bar = Progress(1000, "dvae", stream=stream, clock=clock)
    clock.now += 1
    bar.update(1)
    size = len(stream.getvalue())
    for step in range(2, 20):
        clock.now += 0.01
        bar.update(step)
    assert len(stream.getvalue()) == size
    bar.finish()


def test_durations_and_rates_read_like_a_person_would_say_them() -> None:
    assert [duration(s) for s in (6.6, 171, 3723)] == ["0:07", "2:51", "1:02:03"]
    assert [three_digits(v) for v in (8.1, 1234.4, 0.0123, 0.00001)] == ["8.1", "1234", "0.0123", "1.0e-05"]


def test_a_table_keeps_columns_aligned_long_values_whole_and_markup_plain() -> None:
    stream = io.StringIO()
    path = "x" * 120
    table([{"stage": "dvae", "seconds": 1.5}, {"stage": "[red]dalle", "seconds": None, "path": path}], title="Stages", stream=stream)
    text = stream.getvalue()
    assert "Stages" in text and "[red]dalle" in text and path in text
    assert text.splitlines()[1].split() == ["stage", "seconds", "path"]
