"""The verdict on every fault that the tests inject, the page that lists them, and the evidence it rests on. About 5 s."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import evidence, ledger, storage
from infra.errors import DataError, ExitCode, UsageError
from infra.run_folder import RunFolder
from tests.support import fault_verdicts
from tests.support.faults import FAULTS, Fault
from tests.support.root import ROOT
from tests.support.stopped_run import FIXTURE
from train.advice import facts, words
from train.advice.rules import RULES, decide, keys, plain
from train.loop.metrics import Point
from train.verbs import why


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.words for fault in FAULTS])
def test_each_fault_has_its_verdict_by_its_rule(fault: Fault, tmp_path: Path) -> None:
    verdict, rule, advice = fault_verdicts.judged(fault, tmp_path)
    assert (verdict, rule) == (fault.verdict, fault.rule), advice
    assert fault.names in advice and "{" not in advice


def test_the_page_is_what_the_tables_say_and_every_rule_but_the_last_decides_some_fault() -> None:
    assert fault_verdicts.PAGE.read_text() == fault_verdicts.page(), "run: python -m tests.support.fault_verdicts"
    unused = {rule.name for rule in RULES} - {fault.rule for fault in FAULTS}
    assert unused == {"a wrong command line", "a rank lost its peer", "finished"}, "which no test of a whole attempt injects: they are judged below"
    missing = [fault.where for fault in FAULTS if not (ROOT / fault.where).is_file()]
    assert not missing


@pytest.mark.parametrize(
    ("code", "reason", "rule"),
    [(64, "no such option", "a wrong command line"), (1, "rank 0: another rank is gone", "a rank lost its peer"), (0, "", "finished")],
)
def test_what_no_whole_attempt_injects_is_judged_too(code: int, reason: str, rule: str) -> None:
    assert decide(facts.Facts("dvae", 0, code=code, reason=reason))[0].name == rule


def test_advice_for_a_stage_without_keys_of_its_own_names_those_it_trains_with() -> None:
    of = {stage: decide(facts.Facts(stage, 0, code=1, reason="No space left on device"))[1] for stage in ("clip", "align", "encode")}
    assert ("clip_fit.keep" in of["clip"], "dalle_fit.keep" in of["align"], "dalle_fit.keep" in of["encode"]) == (True, True, True), of


def test_keys_are_those_of_the_configuration_alone() -> None:
    assert keys("dvae_fit.lr and cluster.shm_gib, not e.g. dvae_fit.nothing or shard.mds; dvae_fit.lr") == ["dvae_fit.lr", "cluster.shm_gib"]
    assert plain("rank 3: at 0x7f and 12 s") == plain("rank 4: at 0x8e and 99 s")


def test_the_lines_hold_evidence_loss_verdict_and_rule(tmp_path: Path) -> None:
    (fault,) = [each for each in FAULTS if each.words == "the same node lost twice"]
    found = facts.gather(fault_verdicts.recorded(fault, tmp_path), "dvae")
    assert found is not None
    text = words.of(found)
    assert text.splitlines()[0] == "dvae, attempt 1: CRASH"
    assert "  reason   node 1 (n1) has given no sign for 95 s" in text and "  stood    rank 0 (n0): 40 of 100 steps" in text
    assert "  said     rank 0: last words" in text and "  said " not in words.of(found, said=False)
    assert "  before   CRASH: node 1 (n1) has given no sign" in text and "  rule     the same node again" in text
    assert "  verdict  RESTART ELSEWHERE: without n1" in text and "  lost     40 updates for there is no checkpoint yet" in text
    shown = words.as_json(found)
    assert (shown["verdict"], shown["nodes"], shown["lost"]["updates"]) == ("RESTART ELSEWHERE", ["n1"], 40)


def test_a_watchdog_s_stack_is_told_by_its_innermost_lines() -> None:
    dump = [
        "Thread 0x00007f (most recent call first):",
        '  File "/usr/lib/python3.11/threading.py", line 1 in wait',
        "Thread 0x00007a (most recent call first):",
        '  File "/elsewhere/sitecustomize.py", line 9 in stuck',
        f'  File "{ROOT}/train/loop/trainer.py", line 130 in _train',
        f'  File "{ROOT}/.venv/lib/python3.11/site-packages/typer/main.py", line 3 in main',
        f'  File "{ROOT}/launcher.py", line 390 in main',
        "and words that came later",
    ]
    found = words.stack(dump)
    assert [frame.rpartition(" in ")[2] for frame in found] == ["stuck", "_train", "main"] and "site-packages" not in "".join(found)
    assert words.stack(["nothing of the kind"]) == [] and words.stack(dump[:1]) == []
    text = words.of(facts.Facts("dvae", 0, reason="rank 1: no progress for 540 s", words={1: tuple(dump)}))
    assert '  stack    rank 1: File "/elsewhere/sitecustomize.py", line 9 in stuck' in text and "  rule     a rank hung" in text


def test_a_mistake_of_the_user_has_its_verdict_in_one_line() -> None:
    found = facts.Facts("dvae", 2, code=78, reason="rank 0: dvae_fit.batch = 7 does not divide over 2 processes")
    assert words.verdict(found) == "dvae, attempt 2: STOP: change dvae_fit.batch (rule: a wrong configuration or run folder)"


def test_what_was_lost_is_counted_from_the_newest_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    run = RunFolder(str(tmp_path / "run"))
    number = run.begin_attempt("clip", size=1, saved=4)
    lines = [{"step": step, "time": 1000.0 + step, "values": {"train/loss": 1.0, "optim/grad_norm": 1.0}} for step in range(5, 8)]
    Path(run.at("clip", "metrics", "attempt-9.jsonl")).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.record_exit("clip", number, 0, 1, "RuntimeError: boom")
    ledger.write_end(run, "clip", number, {"code": 1, "reason": "rank 0: RuntimeError: boom", "ended": 0.0})
    found = facts.gather(run, "clip")
    assert found is not None and (found.saved, found.done, found.lost_updates, found.moved) == (4, 7, 3, False)
    assert words.lost(found).startswith("3 updates after the checkpoint of update 4, 0:0")


def test_an_end_that_a_full_disk_left_no_room_to_record_is_told_by_that_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called killed, with the advice to start again."""
    run = RunFolder(str(tmp_path))
    number = run.begin_attempt("dvae", size=1, saved=-1)
    found = facts.gather(run, "dvae")
    assert found is not None and found.reason == "rank 0 ended without a record: it was killed, or its launcher was"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    found = facts.gather(run, "dvae")
    assert found is not None and decide(found)[0].name == "the disk of the run folder is full"
    assert found.reason.endswith(f"or its record could not be written: there is no space left in {run.url}")
    ledger.write_end(run, "dvae", number, {"code": 1, "reason": "rank 0: RuntimeError: boom", "ended": 0.0})
    found = facts.gather(run, "dvae")
    assert found is not None and found.reason == "rank 0: RuntimeError: boom", "it was recorded"


def points(*values: float) -> list[Point]:
    return [Point(step, value, float(step)) for step, value in enumerate(values, 1)]


def test_numbers_before_the_end_are_looked_at() -> None:
    nan = math.nan
    assert facts._numerics({"train/loss": points(1.0, nan, nan)}) == ["train/loss was not finite from update 2 on"]
    assert facts._numerics({"train/loss": points(5.0, 1.0, 1.1, 1.0, 9.0)}) == ["train/loss rose from 1 to 9 over the last 5 points"]
    said = facts._numerics({"train/loss": points(1.0, 1.0), "numerics/gradient_overflow": points(3.0), "optim/grad_norm": points(math.inf)})
    assert said == ["3 updates had overflows so far, the last by update 1", "the gradient's norm was not finite at the end"]
    assert facts._numerics({"train/loss": points(3.0, 2.0, 1.0, 1.1, 0.9), "optim/grad_norm": points(1.0)}) == []


KILLED = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from infra import live, listening, output, signals
stop = signals.install()
output.last()
rank, attempt = int(os.environ["RANK"]), int(os.environ["LAUNCHER_ATTEMPT"])
live.begin(rank)
listening.copy_output(sys.argv[1], "dvae", attempt, rank)
live.say(now=True, phase="", title="dvae", done=7, total=9, unit="steps")
print("the last words of rank", rank, flush=True)
if rank == 1:
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
while not stop:
    live.beat()
    time.sleep(0.05)
sys.exit(75)
"""


@pytest.mark.parametrize(
    ("name", "rule"), [("SIGKILL", "a rank or its launcher was killed"), ("SIGSEGV", "a process broke"), ("SIGBUS", "shared memory is too small")]
)
def test_a_signal_that_ends_a_rank_is_evidence_with_its_last_words(name: str, rule: str, tmp_path: Path) -> None:
    """Real ranks, under the real agent."""
    (tmp_path / "rank.py").write_text(KILLED)
    agent = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from infra import agent; from infra.run_folder import RunFolder; from infra.signals import StopFlag\n"
        f"print(*agent.run_ranks([{str(tmp_path / 'rank.py')!r}, {str(tmp_path)!r}, {name!r}], agent.Placement(2), RunFolder({str(tmp_path)!r}), 'dvae', StopFlag()))"
    )
    done = subprocess.run([sys.executable, "-c", agent], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1].startswith("1 rank 0 ended without a record: it was killed"), done.stdout + done.stderr
    found = facts.gather(RunFolder(str(tmp_path)), "dvae")
    assert found is not None and found.signals == {1: name} and found.words[1] == ("the last words of rank 1",), found
    assert found.stood[1] == "7 of 9 steps" and set(found.names) == {0, 1}
    assert decide(found)[0].name == rule


def test_a_rank_that_its_launcher_killed_later_is_no_evidence(tmp_path: Path) -> None:
    for rank, age in enumerate((0, 40, 39)):
        (tmp_path / f"rank-{rank}").touch()
        os.utime(tmp_path / f"rank-{rank}", (time.time() - age, time.time() - age))
    assert evidence._of_themselves({0: "SIGKILL", 1: "SIGKILL", 2: "SIGKILL"}, tmp_path) == {1: "SIGKILL", 2: "SIGKILL"}
    assert evidence._of_themselves({0: "SIGSEGV", 1: "SIGKILL", 2: "SIGTERM"}, tmp_path) == {0: "SIGSEGV"}
    assert evidence._of_themselves({2: "SIGTERM"}, tmp_path) == {}


def test_an_out_of_memory_kill_on_the_node_is_counted_from_the_attempts_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmstat").write_text("pgfault 12\noom_kill 5\n")
    assert evidence.memory_kills(tmp_path / "vmstat") == 5 and evidence.memory_kills(tmp_path / "none") == 0
    monkeypatch.setattr(evidence, "memory_kills", lambda: 7)
    run = RunFolder(str(tmp_path / "run"))
    number = run.begin_attempt("dvae", size=1, saved=-1)
    assert not evidence.write(run, "dvae", number, 0, {0: 78}, 5, tmp_path), "an end with a code of its own needs none"
    assert evidence.write(run, "dvae", number, 0, {0: -signal.SIGKILL}, 5, tmp_path)
    found = facts.gather(run, "dvae")
    assert found is not None and list(found.memory_kills.values()) == [2] and decide(found)[0].name == "a node's memory is too small"
    assert "cluster.memory_gib" in decide(found)[1]


def test_why_shows_the_attempts_that_did_not_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    run = RunFolder(str(tmp_path / "run"))
    why.main(run.url)
    assert capsys.readouterr().out == f"{run.url}: no attempt has failed.\n"
    for stage, code in (("clip", 1), ("dalle", 0), ("encode.0-of-2", 65)):
        number = run.begin_attempt(stage, size=1, saved=-1)
        storage.write_json(run.attempt_url(stage, number, "end.json"), {"code": code, "reason": f"of {stage}", "ended": 0.0})
    why.main(run.url, as_json=True)
    assert [(each["stage"], each["verdict"]) for each in json.loads(capsys.readouterr().out)] == [("clip", "RESTART"), ("encode.0-of-2", "STOP")]
    why.main(run.url, "dalle", 0)
    assert "rule     finished" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"there was no attempt at 'prepare'; attempts were made at clip, dalle, encode\.0-of-2\."):
        why.main(run.url, "prepare")
    with pytest.raises(UsageError, match="--attempt 3: there was none at 'clip'"):
        why.main(run.url, "clip", 3)
    with pytest.raises(DataError, match="is no run folder"):
        why.main(str(tmp_path))


def test_a_live_attempt_is_not_called_over(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    with run.lock("dvae"):
        run.begin_attempt("dvae", size=1, saved=-1)
        found = facts.gather(run, "dvae")
    assert found is not None and not found.ended and "it may go on" in words.of(found)
    assert facts.gather(run, "clip") is None


def test_an_attempt_that_works_is_not_told_to_start_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was called killed, with the advice to start it again, while it trained."""
    run = RunFolder(str(tmp_path))
    storage.write_json(run.config_url, {})
    with run.lock("dvae"):
        number = run.begin_attempt("dvae", size=2, saved=-1)
        why.main(run.url)
        said = capsys.readouterr().out
        assert said.startswith("dvae, attempt 0: nothing has ended it; its launcher gave a sign of life") and f"launcher.py status {run.url}" in said
        assert "RESTART" not in said and "killed" not in said
        why.main(run.url, as_json=True)
        assert json.loads(capsys.readouterr().out) == []
        run.record_exit("dvae", number, 1, ExitCode.DATA, "shard 3 is damaged")
        why.main(run.url)
        assert "shard 3 is damaged" in (said := capsys.readouterr().out) and "STOP" in said, "a rank has said why it ended"
    run = RunFolder(str(tmp_path / "dead"))
    storage.write_json(run.config_url, {})
    run.begin_attempt("dvae", size=2, saved=-1)
    why.main(run.url)
    assert "RESTART" in capsys.readouterr().out, "nobody holds the stage"


def test_an_attempt_that_tests_leave_behind_without_a_fitting_verdict_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(str(tmp_path / "runs" / "a"))
    number = run.begin_attempt("dvae", size=1, saved=-1)
    run.record_exit("dvae", number, 0, ExitCode.CONFIG, "wrong")
    assert fault_verdicts.unjudged(tmp_path) == []
    wrong = RULES[1]
    monkeypatch.setattr(fault_verdicts, "decide", lambda found: (wrong, ""))
    assert len(fault_verdicts.unjudged(tmp_path)) == 1 and wrong.verdict == "RESTART"
