"""`logs` of a stage whose ranks were silent. The rest of the verb is in test_status.py, beside the runs that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import listening, storage
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from train.verbs import logs


def test_logs_of_a_stage_that_printed_nothing_say_so_and_name_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.begin_attempt("clip", size=1)
    run.begin_attempt("report", size=1)
    storage.write_text(storage.join(listening.logs(run.url, "report", 0), "rank-0.log"), "")
    logs.main(run.url, "report", None, None, follow=False, stop=StopFlag())
    found = capsys.readouterr()
    assert found.out == "" and found.err == "'report', attempt 0: its ranks printed nothing; --stage shows others: clip.\n"


def test_a_rank_that_printed_nothing_is_named_beside_one_that_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.begin_attempt("clip", size=2)
    for rank, words in enumerate(("hello\n", "")):
        storage.write_text(storage.join(listening.logs(run.url, "clip", 0), f"rank-{rank}.log"), words)
    logs.main(run.url, "clip", 1, None, follow=False, stop=StopFlag())
    assert capsys.readouterr() == ("", "'clip', attempt 0: rank 1 printed nothing.\n")


def test_logs_of_an_attempt_whose_launcher_was_killed_are_followed_to_their_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing records such an end: they were followed for ever."""
    run = RunFolder(str(tmp_path / "run"))
    run.begin_attempt("clip", size=1)
    storage.write_text(storage.join(listening.logs(run.url, "clip", 0), "rank-0.log"), "hello\nhalf a l")
    logs.main(run.url, "clip", None, None, follow=True, stop=StopFlag())
    said = capsys.readouterr()
    assert said.out == "hello\nhalf a l\n"
    assert said.err == f"'clip', attempt 0: nobody works on it any more, and no end was recorded: launcher.py why {run.url}\n"
