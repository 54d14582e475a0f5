"""What `status` says of a stage that had finished, and was begun or submitted once more."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from infra import listening, storage
from infra.errors import DataError
from infra.run_folder import RunFolder
from tests.support.stopped_run import FIXTURE
from tests.train.verbs.test_status import begun, held, of, submitted
from train.verbs import standing, status
from train.verbs.standing import Standing


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Its dvae has finished, and is asked for more updates."""
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    found = RunFolder(str(tmp_path / "run"))
    storage.write_json(found.at("dvae", "done.json"), storage.read_json(found.at("dvae", "done.json")) | {"updates": 1, "finished": time.time()})
    assert of(found, "dvae").state == "goes on"
    return found


def test_a_finished_stage_that_goes_on_is_live_killed_or_ended_like_any_other(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with held(run, "dvae"):
        number = begun(run, "dvae")
        found = of(run, "dvae")
        assert (found.state, found.seconds) == ("running", None)
        status.main([run.url, run.url])
        rows = [line.split()[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("/")]  # what it does may be folded
        assert rows == [["dvae", "running"]] * 2
    rank = {"rank": 0, "done": 3, "total": 9, "rate": 2.0, "eta_s": 3.0, "said_s": 1.0}
    live = {"attempt": number, "node": 0, "name": "n", "written": 0.0, "ranks": [rank]}
    storage.write_json(storage.join(listening.place(run.url, "dvae"), "node-0.json"), live)
    found = of(run, "dvae")
    assert (found.state, found.done, found.eta_s) == ("killed", 3, None)
    storage.write_json(run.attempt_url("dvae", number, "end.json"), {"code": 1, "reason": "boom", "ended": 0.0})
    assert (of(run, "dvae").state, of(run, "dvae").end) == ("ended", "CRASH: boom")


def test_a_finished_stage_that_was_submitted_to_go_on_is_queued(run: RunFolder) -> None:
    submitted(run, "dvae", submitted=1.0)
    assert of(run, "dvae").state == "goes on", "the job that finished it"
    submitted(run, "dvae", submitted=time.time())
    assert of(run, "dvae").state == "queued"


def test_of_several_runs_a_stage_that_is_to_go_on_is_shown_before_the_last_finished_one(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    status.main([run.url, run.url])
    assert [line.split()[1:4] for line in capsys.readouterr().out.splitlines()[1:]] == [["dvae", "goes", "on"]] * 2


def test_a_wrong_folder_hides_no_other_run(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="/nowhere is no run folder"):
        status.main([run.url, str(tmp_path / "none"), run.url, str(tmp_path / "nowhere")], as_json=True)
    printed = capsys.readouterr()
    assert [each["run"] for each in json.loads(printed.out)] == [run.url] * 2
    assert printed.err.splitlines() == [f"{tmp_path}/none/config.json is missing: {tmp_path}/none is no run folder."]
    with pytest.raises(DataError, match="/none is no run folder"):
        status.main([str(tmp_path / "none"), str(tmp_path / "nowhere")])


def test_a_long_reason_is_cut_where_one_sees_it() -> None:
    assert status._row(Standing("dalle", state="ended", end="x" * 300))["now"] == "x" * 99 + "…"


def test_a_sign_of_life_that_says_less_than_a_newer_one_is_read() -> None:
    rank, found = {"rank": 0, "done": 3, "total": 8}, Standing("clip")
    assert standing.trouble([{"node": 0, "name": "a", "age_s": 1.0, "ranks": [rank]}], found) == "rank 0 (node a) is gone"
    standing._of_main(rank, 1.5, found)
    assert (found.done, found.total, found.said_s) == (3, 8, 1.5)
