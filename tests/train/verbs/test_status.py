"""What `status` says of runs that work, wait, were killed or whose ranks are stopped; `logs` and `cancel` beside it. About 40 s, most of it one run of two ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra import listening, live, progress, queues, storage
from infra.errors import ConfigError, DataError, ExitCode, LostPeerError, UsageError
from infra.job import Job
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from tests.support.stopped_run import FIXTURE
from train.config import load_run
from train.verbs import cancel, logs, standing, status, why
from train.verbs.standing import Standing

RANK = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from infra import live
live.begin(1)
live.say(now=True, phase="", title="clip", done=3, total=8)
while True:
    live.beat()
    time.sleep(0.02)
"""
HOLDER = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from infra.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return RunFolder(str(tmp_path / "run"))


def of(run: RunFolder, stage: str) -> Standing:
    return standing.of_stage(load_run(run.url, []), run, stage)[0]


def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@contextmanager
def held(run: RunFolder, label: str, *, job: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that holds a stage's lease."""
    words = [sys.executable, "-c", HOLDER, run.url, label]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def begun(run: RunFolder, label: str, **facts: Any) -> int:
    return run.begin_attempt(label, size=2, **facts)


@pytest.mark.parametrize("remote", [False, True])
def test_a_stopped_rank_is_named_and_one_that_waits_for_it_is_not(
    remote: bool, run: RunFolder, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By signs of life of real processes, brought to a local folder or a real S3 server by a real launcher's thread."""
    monkeypatch.setenv("LAUNCHER_LIVE_S", "0.1")
    if remote:
        there = RunFolder(f"{request.getfixturevalue('s3')}/run")
        storage.upload_folder(Path(run.url), there.url)
        run = there
    with held(run, "clip"), listening.listening(run.url, "clip", attempt := begun(run, "clip"), Job()) as folder:
        live.begin(0)
        listening.copy_output(run.url, "clip", attempt, 0)
        live.say(
            now=True, phase="", title="clip", done=3, total=8, unit="steps", rate=2.0, eta_s=2.5, loss=1.25, of_median=0.5, skipped=1, slow=[[1, 3.0]]
        )
        other = subprocess.Popen([sys.executable, "-c", RANK], env=os.environ | {live.VARIABLE: str(folder)})
        try:
            found = until(lambda: each if set((each := of(run, "clip")).heard_s) == {0, 1} else None)
            assert (found.state, found.done, found.total, found.loss, found.of_median, found.skipped) == ("running", 3, 8, 1.25, 0.5, 1)
            assert (found.eta_s, found.rate, found.unit, found.waits, found.slow) == (2.5, 2.0, "updates", "", [[1, 3.0]])
            other.send_signal(signal.SIGSTOP)
            live.beat()
            waits = until(lambda: of(run, "clip").waits)
            assert "rank 1 (node " in waits and "is stopped (SIGSTOP), for" in waits and "rank 0" not in waits
            other.send_signal(signal.SIGCONT)
            until(lambda: not of(run, "clip").waits)
        finally:
            other.kill()
            other.wait()
        assert "rank 1" in until(lambda: of(run, "clip").waits) and "is gone" in of(run, "clip").waits
        live.end()


def test_a_killed_launcher_is_dead_at_once_on_its_machine_and_elsewhere_when_its_lease_is_out(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    with held(run, "clip") as process:
        begun(run, "clip")
        assert of(run, "clip").state == "running"
        process.kill()
        process.wait()
        found = of(run, "clip")
    assert found.state == "killed" and found.end.startswith("killed: no end was recorded by its launcher, whose last sign is ")
    status.main([run.url])
    assert f"clip: {found.end}" in capsys.readouterr().out
    (file,) = Path(run.url, "locks/clip").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"process": "another machine", "lease_s": 60.0}))
    assert of(run, "clip").state == "running", "nobody here can tell yet"
    os.utime(file, (time.time() - 61, time.time() - 61))
    assert of(run, "clip").state == "killed"


def test_an_attempt_that_ended_says_how_and_where_its_checkpoint_is(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for code, reason in ((1, "boom"), (93, "no progress")):
        number = begun(run, "clip")
        storage.write_json(run.attempt_url("clip", number, "end.json"), {"code": code, "reason": reason, "ended": 0.0})
    found = of(run, "clip")
    assert (found.state, found.end, found.restarts, found.saved, found.done) == ("ended", "DIVERGED: no progress", 1, 4, 4)
    assert found.saved_ago_s is not None and found.saved_ago_s >= 0
    status.main([run.url], as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    (clip,) = [each for each in json.loads(line)[0]["stages"] if each["stage"] == "clip"]
    assert clip["end"] == "DIVERGED: no progress" and clip["restarts"] == 1 and clip["saved"] == 4


def test_what_a_foreign_run_says_moves_no_cursor_and_is_no_markup(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its logs and reasons may hold what renames a terminal or writes to its clipboard; and a folder's name in brackets is a name."""
    shutil.copytree(run.url, tmp_path / "[" / "x]")
    run, odd = RunFolder(f"{tmp_path}/[/x]"), "\x1b]52;c;ZWNobw==\x07 \u202e[/b] done"
    number = begun(run, "clip")
    storage.write_json(run.attempt_url("clip", number, "end.json"), {"code": 1, "reason": odd, "ended": 0.0})
    storage.write_text(storage.join(listening.logs(run.url, "clip", number), "rank-0.log"), f"{odd}\n")
    status.main([run.url])
    why.main(run.url, "clip", None, as_json=False)
    logs.main(run.url, "clip", None, None, follow=False, stop=StopFlag())
    progress.table([{"name": odd}], title=odd)
    said = capsys.readouterr().out
    assert not set(said) & set("\x1b\x07\u202e") and said.count("\\x1b]52;c;ZWNobw==\\x07") >= 5 and "[/b] done" in said and "/[/x]" in said


def test_shares_are_counted_and_shown_one_by_one(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.at("encode"))
    number = begun(run, "encode.0-of-3")
    storage.write_json(run.attempt_url("encode.0-of-3", number, "end.json"), {"code": 0, "reason": "finished", "ended": 0.0})
    facts = {"attempt": 0, "node": 0, "name": "n1", "written": time.time()}
    ranks = [{"rank": 0, "state": "R", "heard_s": 0.1, "said_s": 0.1, "done": 45, "total": 120, "unit": "parts", "rate": 3.0, "eta_s": 25.0}]
    storage.write_json(f"{listening.place(run.url, 'encode.1-of-3')}/node-0.json", facts | {"ranks": ranks})
    with held(run, "encode.1-of-3"):
        begun(run, "encode.1-of-3")
        whole, first, second = standing.of_stage(load_run(run.url, []), run, "encode")
        status.main([run.url])
    assert whole.state == "1 running, 1 done of 3 shares" and (first.state, second.state) == ("done", "running")
    assert (second.share, second.done, second.total, whole.done, whole.eta_s) == ("1/3", 45, 120, 45, 25.0)
    said = capsys.readouterr().out
    assert "1 running, 1 done of 3 shares" in said and "45/120 parts" in said and "1/3" in said
    begun(run, "encode.0-of-2")  # divided anew
    assert [each.share for each in standing.of_stage(load_run(run.url, []), run, "encode")[1:]] == ["0/2"]


def test_a_stage_that_nobody_began_names_what_it_waits_for(run: RunFolder) -> None:
    shutil.rmtree(run.at("encode"))
    shutil.rmtree(run.at("dvae"))
    assert (of(run, "encode").state, of(run, "encode").waits) == ("-", "for dvae")
    assert of(run, "prepare").state == "done" and of(run, "report").waits == "for generate, evaluate"


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> Callable[[], list[str]]:
    """Stand-ins that write down what they get; returns what was written."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{script}\n')
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def submitted(run: RunFolder, stage: str, **facts: Any) -> None:
    storage.write_json(run.at("jobs", f"{stage}.json"), {"scheduler": "slurm", "job": "1002", "submitted": time.time() - 5, **facts})


def test_a_queued_job_says_what_it_waits_for_and_one_that_left_its_queue_is_no_more(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted(run, "clip", output="logs/run-clip-%j.out")
    found = of(run, "clip")
    assert found.state == "queued" and "job 1002 (its scheduler is not here to be asked), submitted 5 s ago" in found.waits
    calls = commands(tmp_path, monkeypatch, squeue="echo 'PENDING Resources'")
    assert of(run, "clip").waits.startswith("job 1002 (PENDING: Resources), submitted ") and calls() == [
        "squeue --noheader --jobs=1002 --format=%T %r"
    ]
    commands(tmp_path, monkeypatch, squeue="echo 'RUNNING None'")
    assert (of(run, "clip").state, "job 1002 (RUNNING), submitted " in of(run, "clip").waits) == ("starting", True)
    commands(tmp_path, monkeypatch, squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert (of(run, "clip").state, "is not in the queue any more" in of(run, "clip").waits) == ("not begun", True)
    commands(tmp_path, monkeypatch, squeue="echo 'unable to contact slurm controller' >&2; exit 1")
    assert of(run, "clip").state == "queued", "an answer that is none says nothing"
    begun(run, "clip", job="1002")
    assert of(run, "clip").state == "killed", "it has begun since"
    commands(tmp_path, monkeypatch, squeue="echo 'PENDING BeginTime'")
    assert (of(run, "clip").state, of(run, "clip").waits) == ("queued", "job 1002 (PENDING: BeginTime), to go on"), "requeued"


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ('{"status":{"conditions":[{"type":"Suspended","status":"True","reason":"Queued"}]}}', "Suspended: Queued"),
        ('{"status":{"ready":2}}', "RUNNING"),
        ('{"status":{"replicatedJobsStatus":[{"ready":0}]}}', "PENDING: its pods are not ready"),
        ("", ""),
    ],
)
def test_a_job_in_a_cluster_stands_as_its_conditions_say(
    answer: str, state: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = commands(tmp_path, monkeypatch, kubectl=f"echo '{answer}'")
    submitted(run, "clip", scheduler="k8s", job="run-abc-clip", kind="jobset", namespace="team")
    job = queues.of(run, "clip")
    assert job is not None and queues.state(job) == state
    assert calls()[0].startswith("kubectl get jobset run-abc-clip --namespace=team --ignore-not-found")


def test_logs_of_a_slurm_job_are_its_newest_start_s_or_one_s_of_an_attempt_and_a_rank(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(run, "clip", output="logs/run-clip-%j.out")
    starts = [f"== clip: job 1002, restart {restart}, on n[1-2], now\n0: [rank 0] zero {restart}\n1: [rank 1] one {restart}\n" for restart in (0, 1)]
    storage.write_text(run.at("logs", "run-clip-1002.out"), "".join(starts))
    for restart in (0, 1):
        begun(run, "clip", job="1002", restart=restart)
    logs.main(run.url, "clip", None, None, follow=False, stop=StopFlag())
    assert capsys.readouterr().out == starts[1]
    logs.main(run.url, "", 1, 0, follow=False, stop=StopFlag())
    assert capsys.readouterr().out == "1: [rank 1] one 0\n"
    with pytest.raises(UsageError, match=r"--attempt 7: attempts at 'clip' are 0, 1\."):
        logs.main(run.url, "clip", None, 7, follow=False, stop=StopFlag())
    with pytest.raises(UsageError, match=r"there was no attempt at 'dalle'; attempts were made at clip\."):
        logs.main(run.url, "dalle", None, None, follow=False, stop=StopFlag())
    storage.delete(run.at("logs", "run-clip-1002.out"))
    with pytest.raises(DataError, match=r"run-clip-1002\.out is not there: job 1002 has not begun"):
        logs.main(run.url, "clip", None, None, follow=False, stop=StopFlag())
    submitted(run, "clip")
    with pytest.raises(ConfigError, match=r"job 1002 of 'clip': where its output lies was not noted; see scontrol show job 1002"):
        logs.main(run.url, "clip", None, None, follow=False, stop=StopFlag())
    storage.delete(run.at("jobs", "clip.json"))
    with pytest.raises(DataError, match=r"'clip' ran as job 1002, which was not submitted by launcher\.py"):
        logs.main(run.url, "clip", None, None, follow=False, stop=StopFlag())
    with pytest.raises(UsageError, match="no stage was begun"):
        logs.newest(RunFolder(str(tmp_path)))


def test_logs_that_are_followed_come_as_they_are_written_and_end_with_the_job(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(run, "clip", output="logs/run-clip-%j.out")
    file = Path(run.at("logs", "run-clip-1002.out"))
    file.parent.mkdir(exist_ok=True)
    file.write_text("first\nhalf")
    commands(tmp_path, monkeypatch, squeue=f"[ -e {tmp_path}/over ] || echo 'RUNNING None'")
    monkeypatch.setattr(logs, "_POLL_S", 0.01)

    def sleep(seconds: float) -> None:
        file.write_text("first\nhalf and half\nkilled in the midst")
        (tmp_path / "over").touch()

    # A clock of this module alone: other threads of the process sleep too.
    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    logs.main(run.url, "clip", None, None, follow=True, stop=StopFlag())
    assert capsys.readouterr().out == "first\nhalf and half\nkilled in the midst\n"


def test_jobs_are_cancelled_and_their_pods_logs_shown_by_their_schedulers(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kubectl = 'case "$1" in get) echo \'{"status":{"ready":1}}\';; logs) echo "[pod/a] [rank 0] words"; echo "[pod/b] [rank 1] more";; esac'
    calls = commands(tmp_path, monkeypatch, squeue="echo 'RUNNING None'", scancel="exit 0", kubectl=kubectl)
    submitted(run, "clip")
    submitted(run, "dalle", scheduler="k8s", job="run-abc-dalle", kind="jobset", namespace="team")
    begun(run, "dalle", job="uid")
    logs.main(run.url, "dalle", 1, None, follow=True, stop=StopFlag())
    assert capsys.readouterr().out == "[pod/b] [rank 1] more\n"
    assert "--selector=jobset.sigs.k8s.io/jobset-name=run-abc-dalle --prefix --tail=-1 --max-log-requests=1000 --follow" in calls()[-1]
    cancel.main(run.url)
    said = capsys.readouterr().out
    assert "clip: job 1002 was told to end" in said and "dalle: jobset run-abc-dalle in namespace team was told to end" in said
    assert "scancel 1002" in calls() and any(call.startswith("kubectl delete jobset run-abc-dalle --namespace=team") for call in calls())
    commands(tmp_path, monkeypatch, scancel="echo 'Access denied' >&2; exit 1")
    with pytest.raises(LostPeerError, match="scancel 1002 ended with 1: Access denied"):
        cancel.main(run.url, "clip")
    commands(tmp_path, monkeypatch, kubectl="exit 3")
    with pytest.raises(ConfigError, match="kubectl logs of jobset run-abc-dalle in namespace team ended with 3"):
        logs.main(run.url, "dalle", None, None, follow=False, stop=StopFlag())


def test_what_cannot_be_ended_from_here_is_named_with_where_it_is(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    with held(run, "clip"):
        (file,) = Path(run.url, "locks/clip").glob("*.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"process": "another machine", "node": "n7", "pid": 12}))
        with pytest.raises(ConfigError, match="clip is held by process 12 on n7: end it there"):
            cancel.main(run.url)
    capsys.readouterr()
    os.utime(file, (1, 1))
    cancel.main(run.url)
    assert capsys.readouterr().out == f"nothing works on {run.url}, and nothing waits to.\n"
    with pytest.raises(DataError, match="is no run folder"):
        cancel.main(f"{run.url}-2")


def test_several_runs_are_a_table_of_one_line_each(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(run.url, other)
    with held(run, "dalle"):
        begun(run, "dalle")
        status.main([run.url, str(other)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("/")]  # what it does may be folded
    assert len(rows) == 2 and rows[0][:3] == [run.url, "dalle", "running"] and rows[1][0] == str(other)


def launch(*words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launcher.py"), *words]
    given = os.environ | {"LAUNCHER_LIVE_S": "0.2", "LAUNCHER_HANG_S": "300"} | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=given)


def test_a_run_of_two_ranks_is_watched_stopped_cancelled_and_read(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it: a real launcher, a rank that is stopped (SIGSTOP), the words of both, and the end."""
    process = launch("clip", run.url, "--nproc", "2", "--go-on", "clip_fit.steps=100000", "clip_fit.eval_every=100000", "clip_fit.lines_every=5")
    try:
        found = until(lambda: each if (each := of(run, "clip")).done > 10 else None, 300)
        assert found.state == "running" and set(found.heard_s) == {0, 1} and max(found.heard_s.values()) < 30 and found.loss is not None
        assert found.rate > 0 and found.of_median and found.restarts == 0 and found.saved == 4
        (node,) = standing.nodes_of(run, "clip", 0)
        victim = next(int(rank["pid"]) for rank in node["ranks"] if rank["rank"] == 1)
        os.kill(victim, signal.SIGSTOP)
        assert "rank 1 (node " in until(lambda: of(run, "clip").waits, 60)
        status.main([run.url])
        assert "is stopped (SIGSTOP)" in capsys.readouterr().out
        os.kill(victim, signal.SIGCONT)
        cancel.main(run.url)
        assert f"clip: process {process.pid} was told to stop" in capsys.readouterr().out
        output = process.communicate(timeout=PATIENCE_S)[0]
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == ExitCode.REQUEUE, output
    ended = of(run, "clip")
    assert ended.state == "ended" and ended.end.startswith("REQUEUE: clip: stopped by a signal after update ") and ended.saved == ended.done > 10
    logs.main(run.url, "", None, None, follow=True, stop=StopFlag())
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("[rank 0] clip  ") and "/100000 steps" in line]
    assert len(lines) > 1 and all(int(line.split()[4].partition("/")[0]) % 5 == 0 for line in lines[1:]), "a line for each five updates"
    assert lines[1].split()[3].count(":") == 2 and "ETA" in lines[1] and "loss" in lines[1] and "skipped 0" in lines[1]
    assert {line.removeprefix("[rank 0] ") for line in lines} <= set(output.splitlines())
    logs.main(run.url, "clip", 0, 0, follow=False, stop=StopFlag())
    assert capsys.readouterr().out.splitlines()[0] == said[0].removeprefix("[rank 0] ")
    with pytest.raises(DataError, match="holds no words of rank 7 of attempt 0 at 'clip', but of ranks 0, 1"):
        logs.main(run.url, "clip", 7, 0, follow=False, stop=StopFlag())


def test_status_looks_again_until_it_is_stopped(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    class Twice(StopFlag):
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            return self.asked > 2

    status.main([run.url], as_json=True, watch_s=0.05, stop=Twice())
    assert len(capsys.readouterr().out.splitlines()) >= 1
