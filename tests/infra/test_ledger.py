"""The ledger of attempts: what the newest one says decides, and each end is looked up once."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import ledger
from infra.errors import DivergedError
from infra.run_folder import RunFolder


def ended(run: RunFolder, *codes: int) -> None:
    """Attempts that ended with these codes, each a restart of the one before."""
    for restart, code in enumerate(codes):
        number = run.begin_attempt("dvae", size=2, restart=restart, run_id=f"7.{restart}", saved=-1)
        for rank in range(2):
            run.record_exit("dvae", number, rank, code, f"reason {code}")


@pytest.mark.parametrize(("codes", "refused"), [((1, 1, 1), True), ((1, 1, 93), False), ((93, 1, 1, 1), True), ((1, 1, 75), False)])
def test_a_crash_loop_is_one_by_its_newest_attempts(tmp_path: Path, codes: tuple[int, ...], refused: bool) -> None:
    """An attempt that ended with a code of its own is nobody's crash: what it says was said when it ended."""
    run = RunFolder(str(tmp_path))
    ended(run, *codes)
    if refused:
        with pytest.raises(DivergedError, match=r"\d crashes in a row"):
            ledger.refuse_a_crash_loop(run, "dvae", len(codes), 2)
    else:
        ledger.refuse_a_crash_loop(run, "dvae", len(codes), 2)


def test_attempts_come_in_order_with_what_they_began_with_and_an_empty_ledger_has_none(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert ledger.read(run, "dvae") == []
    for restart in range(11):  # the eleventh sorts before the second as text
        number = run.begin_attempt("dvae", size=1, restart=restart, run_id=f"7.{restart}", saved=5 * restart)
        run.record_exit("dvae", number, 0, 75, "saved")
    found = ledger.read(run, "dvae")
    assert [(each.number, each.restart, each.saved, each.run_id) for each in found] == [(i, i, 5 * i, f"7.{i}") for i in range(11)]
    assert ledger.read(run, "dvae") == found


def test_an_attempt_that_nobody_began_is_one_without_a_past(tmp_path: Path) -> None:
    """Its rank's record reached the storage, and what node 0 wrote at its beginning did not."""
    run = RunFolder(str(tmp_path))
    run.record_exit("dvae", 0, 0, 1, "boom")
    (found,) = ledger.read(run, "dvae")
    assert (found.number, found.run_id, found.restart, found.saved, found.code) == (0, "", 0, -1, 1)


def stopped(*saved: int, code: int = 75) -> list[ledger.Attempt]:
    """Attempts of one submission that ended alike; each says where the newest checkpoint was when it began."""
    return [ledger.Attempt(number, "", number, code, "stopped", step) for number, step in enumerate(saved)]


def test_stops_that_move_no_checkpoint_are_requeued_as_often_as_is_allowed_and_then_end_with_93() -> None:
    assert ledger.idle_in_a_row(stopped(0, 5, 5), 5) == 2 and ledger.idle_in_a_row(stopped(5), 6) == 0
    assert ledger.idle_in_a_row(stopped(5, 5, 5), 5) == 3 and ledger.idle_in_a_row([*stopped(5, 5), *stopped(5, 5)], 5) == 2, "of one submission"
    assert ledger.judge(stopped(0, 5, 5), 5, 9, stops=2).code == 75
    verdict = ledger.judge(stopped(0, 5, 5, 5), 5, 9, stops=2)
    assert verdict.code == 93 and verdict.reason.startswith("3 starts in a row moved no checkpoint, the last: stopped")
    assert ledger.judge(stopped(0, 5, 5, 5), 5, 9).code == 75, "a stage without checkpoints"
    assert ledger.judge(stopped(5, 5, 5, 5, code=65), 5, 9, stops=2).code == 65, "a code of its own says more"


def test_an_attempt_ended_when_the_last_of_its_ranks_crashed() -> None:
    records = [{"code": code, "time": time, "reason": ""} for code, time in ((1, 2.0), (1, 7.0), (75, 9.0))]
    assert ledger.ending(1, "boom", records) == {"code": 1, "reason": "boom", "ended": 7.0}
    assert ledger.ending(75, "stopped", [])["ended"] == 0.0
