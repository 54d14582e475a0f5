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
