"""What `status`, `logs` and `why` say while a launcher starts, and while no progress comes. A few seconds; the start of two real ranks is in test_status.py."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from infra import announce, lease, listening, live, storage
from infra.job import Job
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.stopped_run import FIXTURE
from tests.train.verbs.test_status import begun, held, of
from train.advice import facts
from train.verbs import logs, standing, status
from train.verbs.standing import Standing


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return RunFolder(str(tmp_path / "run"))


def signs(run: RunFolder, label: str, *ranks: dict[str, Any]) -> None:
    known = [{"rank": number, "state": "S", "heard_s": 0.1, **rank} for number, rank in enumerate(ranks)]
    node = {"attempt": 0, "node": 0, "name": "n", "written": time.time(), "ranks": known}
    storage.write_json(storage.join(listening.place(run.url, label), "node-0.json"), node)


def test_a_start_is_called_one_from_the_lease_to_the_first_progress(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Its ranks import for seconds, and nothing was said of them."""
    with held(run, "clip") as process:
        found = of(run, "clip")
        assert found.state == "starting" and re.fullmatch(rf"since \d\d:\d\d:\d\d \(\d+ s\): process {process.pid} on \S+", found.waits)
        begun(run, "clip")
        found = of(run, "clip")
        assert found.state == "running" and re.fullmatch(r"starting since \d\d:\d\d:\d\d \(\d+ s\)", found.waits)
        status.main([run.url])
        assert f"clip: {found.waits.partition(' (')[0]}" in capsys.readouterr().out
        signs(run, "clip", {"phase": "the imports"})
        assert re.fullmatch(r"starting since \S+ \(\d+ s\): the imports", of(run, "clip").waits)
        signs(run, "clip", {"phase": "the start", "title": "clip"})
        assert of(run, "clip").waits == "the start", "progress was said before: this is no start"
        signs(run, "clip", {"phase": "a save"})
        assert of(run, "clip").waits == "a save"


def test_a_launcher_that_has_begun_no_attempt_yet_is_not_taken_for_the_one_that_was_killed(run: RunFolder) -> None:
    """Its lease kept the old attempt running in `status`, whose node had given no sign for hours, and in `why`."""
    number = begun(run, "clip")
    assert of(run, "clip").state == "killed"
    signs(run, "clip", {"title": "clip", "done": 3, "total": 8})
    with held(run, "clip"):
        found = of(run, "clip")
        assert (found.state, found.waits.startswith("since "), found.heard_s) == ("starting", True, {})
        assert facts.is_over(run, "clip", newest=True)
        begun(run, "clip")
        assert not facts.is_over(run, "clip", newest=True)
    assert number == 0


def test_a_finished_stage_whose_launcher_starts_once_more_starts(run: RunFolder) -> None:
    done = storage.read_json(run.at("dvae", "done.json"))
    storage.write_json(run.at("dvae", "done.json"), done | {"updates": 1, "finished": time.time() - 1})
    with held(run, "dvae"):
        assert of(run, "dvae").state == "starting"


def test_the_first_sign_of_ranks_is_brought_as_soon_as_there_is_one(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was brought with the second of the node, ten seconds later."""
    monkeypatch.setenv("LAUNCHER_LIVE_S", "60")
    monkeypatch.setattr(listening, "_SOON_S", 0.05)
    file = Path(storage.local_path(listening.place(run.url, "clip"))) / "node-0.json"
    with listening.listening(run.url, "clip", 0, Job()):
        until = time.monotonic() + 20
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert storage.read_json(str(file))["ranks"] == []
        live.begin(0)
        while not storage.read_json(str(file))["ranks"] and time.monotonic() < until:
            time.sleep(0.02)
        live.end()
        assert [rank["phase"] for rank in storage.read_json(str(file))["ranks"]] == ["the start"]


UPDATES = {"title": "clip", "done": 3, "total": 8, "rate": 2.0, "eta_s": 2.5, "of_median": 1.0, "usual_s": 0.5}


def test_a_speed_is_of_then_and_the_time_to_go_unknown_while_no_progress_comes(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank was stopped, and the table went on to show a speed and an ETA."""
    with held(run, "clip"):
        begun(run, "clip")
        signs(run, "clip", UPDATES | {"said_s": 2.9})
        found = of(run, "clip")
        assert (found.rate_ago_s, found.eta_s, status._speed(found), status._eta(found)) == (None, 2.5, "2/s (100% of its median)", "0:02")
        signs(run, "clip", UPDATES | {"said_s": 40.0}, {"state": "T"})
        found = of(run, "clip")
        assert found.eta_s is None and found.rate_ago_s == pytest.approx(40, abs=5)
        status.main([run.url])
        said = capsys.readouterr().out
        assert re.search(r" 2/s, 0:4\d ago +unknown ", said) and "rank 1 (node n) is stopped (SIGSTOP)" in said
        signs(run, "clip", UPDATES | {"said_s": 40.0, "phase": "an evaluation"})
        found = of(run, "clip")
        assert found.eta_s == 2.5 and found.rate_ago_s is not None, "it goes on after that"
        signs(run, "clip", UPDATES | {"said_s": 40.0, "usual_s": 10.0})
        assert of(run, "clip").rate_ago_s is None, "by its own pace that is not long"


def test_rank_0_is_looked_for_on_every_node(run: RunFolder) -> None:
    """Elastic orders nodes by their addresses, n10 before n9, and a job whose rank 0 was not on node 0 showed no speed."""
    with held(run, "clip"):
        begun(run, "clip")
        for number, rank in ((0, {"rank": 1}), (1, {"rank": 0, **UPDATES, "said_s": 0.1})):
            node = {"attempt": 0, "node": number, "name": "n", "written": time.time(), "ranks": [{"state": "S", "heard_s": 0.1, **rank}]}
            storage.write_json(storage.join(listening.place(run.url, "clip"), f"node-{number}.json"), node)
        found = of(run, "clip")
    assert (found.rate, found.done, found.eta_s, found.waits, set(found.heard_s)) == (2.0, 3, 2.5, "", {0, 1})


def test_what_is_quiet_is_judged_by_the_median_or_else_by_the_speed() -> None:
    assert live.quiet_s({"said_s": 4.0}) is None, "no pace is known"
    assert live.quiet_s({"said_s": 4.0, "rate": 2.0}) == 4.0 and live.quiet_s({"said_s": 4.0, "rate": 1.0}) is None
    assert live.quiet_s({"said_s": 4.0, "rate": 9.0, "usual_s": 1.0}) is None and live.quiet_s({"said_s": 6.0, "usual_s": 1.0}, 3.0) == 9.0
    assert live.quiet_s({"said_s": 2.9, "rate": 1000.0}) is None, "less than a look apart"


def test_schedulers_are_told_that_no_progress_comes() -> None:
    heard: list[dict[str, Any]] = []
    told = announce.Announcer([("here", heard.append)])
    told({"label": "dvae", "ended": True, "said_s": 40.0, "loss": 0.5, **UPDATES})
    told({"label": "dvae", "said_s": 40.0, "loss": 0.5, **UPDATES})
    assert heard[0]["eta_s"] is None
    told._due = 0.0
    told({"label": "dvae", "said_s": 40.0, "loss": 0.5, **UPDATES})
    assert (
        announce.line(heard[-1]) == "dvae 3/8 2/s (40 s ago) loss 0.5"
        and "estimatedRemainingSeconds" not in announce.status(heard[-1])["trainerStatus"]
    )


def test_shares_that_are_stopped_count_for_no_speed_and_leave_the_time_to_go_unknown() -> None:
    found = Standing("encode")
    standing._together(
        found, [Standing("encode", "0/2", "running", rate=2.0, eta_s=9.0), Standing("encode", "1/2", "running", rate=3.0, rate_ago_s=40.0)], None
    )
    assert (found.rate, found.eta_s) == (2.0, None)


@pytest.mark.parametrize(
    ("states", "chosen"),
    [
        (["done", "queued", "running", "ended"], 2),
        (["done", "killed", "queued", "-"], 2),
        (["done", "goes on", "ended", "-"], 2),
        (["done", "out of date", "done", "-"], 1),
        (["done", "done", "-", "-"], 1),
        (["-", "-"], 0),
    ],
)
def test_of_several_runs_the_stage_that_needs_a_look_is_shown(states: list[str], chosen: int) -> None:
    stages = [Standing(str(number), state=state) for number, state in enumerate(states)]
    assert status._that_matters(stages).stage == str(chosen)


def test_logs_that_are_followed_from_the_start_wait_for_each_rank(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They ended at once with "holds no words", or never showed a rank that began after the first."""
    monkeypatch.setattr(logs, "_POLL_S", 0.02)
    place = storage.local_path(listening.logs(run.url, "clip", 0))
    with held(run, "clip"):
        begun(run, "clip")

        def write() -> None:
            for rank in (0, 1):
                time.sleep(0.2)
                place.mkdir(parents=True, exist_ok=True)
                (place / f"rank-{rank}.log").write_text(f"words of {rank}\n")
            storage.write_json(run.attempt_url("clip", 0, "end.json"), {"code": 0, "reason": "finished", "ended": 0.0})

        thread = threading.Thread(target=write)
        thread.start()
        logs.main(run.url, "clip", None, None, follow=True, stop=StopFlag())
        thread.join()
    assert capsys.readouterr() == ("[rank 0] words of 0\n[rank 1] words of 1\n", "")


def test_a_look_for_the_end_of_what_is_followed_is_one_request(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_text(storage.join(listening.logs(run.url, "clip", 0), "rank-0.log"), "words\n")
    asked: list[str] = []
    exists = storage.exists

    def noting(url: str) -> bool:
        asked.append(url)
        return exists(url)

    with held(run, "clip"):
        begun(run, "clip")
        storage.write_json(run.attempt_url("clip", 0, "end.json"), {"code": 0, "reason": "finished", "ended": 0.0})
        monkeypatch.setattr(storage, "exists", noting)
        logs.main(run.url, "clip", None, None, follow=True, stop=StopFlag())
    assert [url.rpartition("/")[2] for url in asked] == ["end.json"]


def test_an_end_that_is_written_between_two_looks_is_no_missing_one(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.write_text(storage.join(listening.logs(run.url, "clip", 0), "rank-0.log"), "words\n")
    begun(run, "clip")

    def at_work(*_: Any) -> None:
        storage.write_json(run.attempt_url("clip", 0, "end.json"), {"code": 0, "reason": "finished", "ended": 0.0})

    monkeypatch.setattr(lease, "at_work", at_work)
    logs.main(run.url, "clip", None, None, follow=True, stop=StopFlag())
    assert capsys.readouterr().err == ""
