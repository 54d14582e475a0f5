"""A real SLURM of three nodes on this machine: the whole pipeline, and jobs that are stopped, requeued, lost, wrong, poisoned. About 3 minutes.

Needs root and the packages slurm-wlm and munge (Debian: apt-get install --no-install-recommends slurm-wlm munge); skipped elsewhere, where
test_slurm.py runs the same scripts against stand-ins. ``python -m tests.support.slurm_faults`` runs it and writes docs/slurm_faults.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import ledger
from infra.run_folder import RunFolder
from tests.support.patience import PATIENCE_S
from tests.support.processes import alive, inner, throttled
from tests.support.root import ROOT
from tests.support.slurm_cluster import Cluster, missing
from tests.support.slurm_runs import Record, codes, copy, log_of, losses, output, reads, restarted, row, training
from train.config import load_run
from train.run.stage_table import used_by

REASON = missing()
STEPS = 600  # enough to be struck three times on a fast machine

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose dVAE was trained undisturbed, by two ranks without SLURM; ``prepared`` lies beside it, from before."""
    root = tmp_path_factory.mktemp("calm")
    words = ["prepare", "tiny", f"run.root={root}", f"dvae_fit.steps={STEPS}", f"dvae_fit.eval_every={STEPS}", "dvae_fit.save_every=50"]
    for command in ([*words, "--nproc", "1"], ["dvae", str(root / "tiny"), "--nproc", "2"]):
        subprocess.run(
            [sys.executable, str(ROOT / "launcher.py"), *command], check=True, timeout=PATIENCE_S, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        )
        if command[0] == "prepare":
            shutil.copytree(root / "tiny", root / "prepared")
    return root / "tiny"


@pytest.fixture(scope="module")
def alone(calm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by one rank: sums of another number of ranks differ in their last bit."""
    run = copy(calm.parent / "prepared", tmp_path_factory.mktemp("alone"))
    words = [sys.executable, str(ROOT / "launcher.py"), "dvae", str(run), "--nproc", "1"]
    subprocess.run(words, check=True, timeout=PATIENCE_S, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    return run


@pytest.fixture
def run(calm: Path, tmp_path: Path) -> Path:
    """A run whose images are prepared."""
    return copy(calm.parent / "prepared", tmp_path)


def test_a_job_of_two_nodes_is_signalled_requeued_and_loses_a_node_and_ends_as_if_undisturbed(
    slurm: Cluster, run: Path, calm: Path, record_property: Record
) -> None:
    job = slurm.submit("dvae", str(run), options=("--nodes=2", *output(run)))
    training(slurm, run, 0)
    since = time.monotonic()
    slurm.run("scancel", "--signal=USR2", job)  # what --signal=USR2@720 sends
    restarted(slurm, job, 1)
    assert codes(run) == {0: 75}
    training(slurm, run, 1)
    row(record_property, "USR2 before the limit, two nodes", "saved after the step, requeued by the job itself, goes on", since)
    since = time.monotonic()
    slurm.run("scontrol", "requeue", job)
    restarted(slurm, job, 2)
    training(slurm, run, 2)
    row(record_property, "scontrol requeue", "SLURM's TERM saves too, if KillWait is long enough; goes on", since)
    since = time.monotonic()
    tasks = slurm.tasks("n2")
    assert tasks, "n2 has part in the job"
    slurm.node("kill-node", 2)
    for task in tasks:  # a lost node does nothing more
        with contextlib.suppress(ProcessLookupError):
            os.kill(task, signal.SIGSTOP)
    restarted(slurm, job, 3)
    slurm.node("node", 2)
    training(slurm, run, 3)
    row(record_property, "kill -9 of a node's slurmd, its ranks frozen", "SLURM misses the node, ends the job's other half, requeues; goes on", since)
    (end,) = slurm.wait_for_end(job)
    text = log_of(run, "dvae", job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "3"), text
    assert losses(run) == losses(calm) and losses(run)[-1][0] == STEPS
    row(record_property, "all three, to the end", f"losses of all {STEPS} updates equal an undisturbed run's", since)
    # The log is appended, with a line for each restart, and labelled.
    assert re.findall(r"^== dvae: job \d+, restart (\d), on n\[1[-,]\d\]", text, re.M) == ["0", "1", "2", "3"]
    assert "0: [rank 0] dvae" in text and "1: dvae: done" in text and "resource_tracker" not in text
    begin = json.loads((run / "exits/dvae/attempt-3/begin.json").read_text())
    assert (begin["run_id"], begin["size"]) == (f"{job}.3", 2)


def test_a_wrong_configuration_is_not_retried(slurm: Cluster, run: Path, record_property: Record) -> None:
    since = time.monotonic()
    config = json.loads((run / "config.json").read_text())
    config["dvae_fit"]["batch"] = 7
    (run / "config.json").write_text(json.dumps(config))
    job = slurm.submit("dvae", str(run), options=("--nodes=2", *output(run)))
    (end,) = slurm.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "78:0", "0"), log_of(run, "dvae", job)
    assert "dvae_fit.batch = 7 does not divide over 2 processes" in log_of(run, "dvae", job) and codes(run) == {0: 78}
    row(record_property, "a batch that does not divide over the ranks", "FAILED with 78, not retried; the log names the key", since)


def test_a_crash_loop_ends_after_so_many_crashes_in_a_row(slurm: Cluster, run: Path, record_property: Record) -> None:
    since = time.monotonic()
    job = slurm.submit("dvae", str(run), options=output(run), LAUNCHER_RETRIES="1")
    for attempt in range(2):
        begun = run / "exits" / "dvae" / f"attempt-{attempt}" / "begin.json"
        slurm.wait(f"attempt {attempt} to begin", begun.exists)
        slurm.run("kill", "-9", str(json.loads(begun.read_text())["pid"]))
    (end,) = slurm.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "93:0", "1"), log_of(run, "dvae", job)
    assert codes(run) == {0: 1, 1: 1} and "2 crashes in a row without progress" in log_of(run, "dvae", job)
    row(record_property, "killed at each start, cluster.retries = 1", "requeued once, then FAILED with 93", since)


@pytest.mark.soak
def test_the_time_limit_announces_itself_and_the_job_requeues(slurm: Cluster, run: Path, record_property: Record) -> None:
    since = time.monotonic()
    config = json.loads((run / "config.json").read_text())
    config["dvae_fit"] |= {"steps": 1_000_000, "eval_every": 1_000_000}
    (run / "config.json").write_text(json.dumps(config))
    # The announced time is the whole limit: SLURM, which looks every 30 s, signals at its first look, wherever the job is then.
    job = slurm.submit("dvae", str(run), options=("--time=20", "--signal=USR2@1200", *output(run)))
    restarted(slurm, job, 1)
    slurm.run("scancel", job)
    slurm.wait_for_end(job)
    text = log_of(run, "dvae", job)
    assert "verdict 75" in text and ("stopped by a signal after update" in text or "nothing was begun" in text), text
    row(record_property, "the time limit comes near (--signal=USR2@...)", "saved, requeued by the job itself", since)


@pytest.mark.soak
@pytest.mark.parametrize(("nodes", "frozen"), [(1, False), (2, False), (1, True)], ids=["one node", "two nodes", "one node, frozen past its lease"])
def test_a_lost_node_that_holds_the_lease_and_whose_processes_live_on_loses_the_job_and_nothing_else(
    slurm: Cluster, run: Path, calm: Path, alone: Path, record_property: Record, nodes: int, frozen: bool
) -> None:
    """slurmd is killed, and with it all that SLURM knows of the node: the job starts elsewhere while its earlier start trains on, or sleeps."""
    job = slurm.submit("dvae", str(run), options=(f"--nodes={nodes}", *output(run)), LAUNCHER_LEASE_S="12")
    training(slurm, run, 0)
    begin = json.loads((run / "exits/dvae/attempt-0/begin.json").read_text())
    node = next(name for name in ("n1", "n2", "n3") if begin["pid"] in [inner(task) for task in slurm.tasks(name)])
    orphans = slurm.tasks(node)
    since = time.monotonic()
    slurm.node("kill-node", int(node[1:]))
    try:
        with throttled(orphans, pause_s=1000 if frozen else 0.57):
            restarted(slurm, job, 1)
            slurm.wait("the new start to meet the old one", lambda: "waiting for it" in log_of(run, "dvae", job))
            if frozen:
                training(slurm, run, 1)
            assert any(map(alive, orphans)), "SLURM has not reached them"
        woken = time.monotonic()
        slurm.wait("the earlier start to end", lambda: not any(map(alive, orphans)))
        ended_s = time.monotonic() - woken
        # Of two nodes, the orphan waits a minute for the other launcher's word; its rank has ended, and no newer attempt has begun.
        assert ended_s < (30 if nodes == 1 else 120), f"a launcher that finds a newer attempt begun ends itself: {ended_s:.0f} s"
        (end,) = slurm.wait_for_end(job)
    finally:
        slurm.node("node", int(node[1:]))
    text = log_of(run, "dvae", job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), text
    assert "wait for it, or use another run.name" not in text, "no start ends with 78 because of an earlier one"
    assert losses(run) == losses(alone if nodes == 1 else calm) and [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    first = ledger.read(RunFolder(str(run)), "dvae")[0]
    if frozen:
        assert "taken over" in text and ledger.read(RunFolder(str(run)), "dvae")[1].code == 0, text
        outcome = f"the lease runs out, the new start goes on from the last checkpoint; the sleeper ends {ended_s:.0f} s after it wakes; losses equal"
    elif nodes == 1:
        assert first.code == 75 and "after update" in first.reason, (first, text)
        assert "waiting for it" in text and "the launcher that it started lives on" in text and "it was killed" not in text, text
        outcome = "the new start waits; the old one is asked, saves and ends with 75, and does not requeue; goes on from there, losses equal"
    else:  # SLURM ends the other half, with which the orphan saves where KillWait is long enough
        assert first.code in (75, 1) and "rank 0 ended without a record" not in first.reason, (first, text)
        outcome = f"SLURM ends the job's other half, and with it the old start ({first.code}); goes on elsewhere from its checkpoint, losses equal"
    asked = ", frozen for longer than its lease" if frozen else ", which train on"
    row(record_property, f"kill -9 of slurmd on the node that holds the lease, {nodes} node{'s' * (nodes > 1)}, its processes{asked}", outcome, since)


@pytest.mark.soak
def test_a_time_limit_that_leaves_no_time_is_refused_at_submission_and_by_hand_comes_to_an_end(
    slurm: Cluster, run: Path, tmp_path: Path, record_property: Record
) -> None:
    """With an environment that takes half a minute to load: SLURM's signal is there before anything begins, again and again."""
    since = time.monotonic()
    words, before = [sys.executable, "launcher.py", "dvae", str(run), "--on", "slurm"], slurm.run("squeue", "--noheader", "--format=%A")
    refused = slurm.run("sh", "-c", '"$@"; echo "code $?"', "sh", *words, "cluster.hours=0.2", "cluster.grace_s=720")
    assert (
        "is not longer than cluster.grace_s = 720" in refused and "code 78" in refused and slurm.run("squeue", "--noheader", "--format=%A") == before
    ), refused
    fits = slurm.run(*words, "cluster.hours=0.5", "cluster.grace_s=720", "cluster.cpus=1", "cluster.memory_gib=1", "--dry-run")
    assert "--time=0:30:00" in fits and re.search(r"sbatch --test-only: sbatch: Job \d+ to start at ", fits), fits
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[ "$2" = verdict ] || sleep 31\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    job = slurm.submit("dvae", str(run), options=("--time=5", *output(run)), LAUNCHER_VENV=str(tmp_path / "venv"))
    (end,) = slurm.wait_for_end(job)
    text = log_of(run, "dvae", job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "93:0", str(ledger.STOPS)), text
    assert f"stopped {ledger.STOPS + 1} times in a row before an attempt was begun: the time limit" in text and codes(run) == {}
    row(
        record_property,
        "a time limit within the grace, by hand, and a start that takes longer than SLURM's first look",
        f"stopped and requeued {ledger.STOPS} times, then FAILED with 93",
        since,
    )


def test_a_cancelled_job_saves_and_stays_cancelled(slurm: Cluster, tmp_path: Path, record_property: Record) -> None:
    """With a launcher that saves at once on TERM: the job script must not requeue what its owner has cancelled."""
    since = time.monotonic()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    waits = "import signal; print('waits', flush=True); signal.sigwait([signal.SIGTERM]); print('saved', flush=True); exit(75)"
    python.write_text(f'#!/bin/bash\n[ "$2" != verdict ] || exit 75\nexec {sys.executable} -c "{waits}"\n')
    python.chmod(0o755)
    job = slurm.submit("dvae", "RUN", options=("--nodes=2", *output(tmp_path)), LAUNCHER_VENV=str(tmp_path / "venv"))
    log = tmp_path / f"dvae-{job}.out"
    slurm.wait("both launchers", lambda: log.exists() and log.read_text().count(": waits") == 2)
    slurm.run("scancel", job)
    (end,) = slurm.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0") and log.read_text().count(": saved") == 2, log.read_text()
    row(record_property, "scancel", "both nodes save; CANCELLED, and not requeued", since)


def test_an_array_finishes_all_but_its_poisoned_share_and_names_what_poisons_it(
    slurm: Cluster, calm: Path, tmp_path: Path, record_property: Record
) -> None:
    since = time.monotonic()
    run = copy(calm, tmp_path)
    victim = sorted((run / "images" / "train").glob("part-*/shard.*.mds"))[0]
    bytes_ = victim.read_bytes()
    victim.write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))
    options = ("--array=0-2", "--cpus-per-task=4", "--mem=8G", f"--output={run}/%x-%a.out")
    ends = {end["ArrayTaskId"]: end for end in slurm.wait_for_end(slurm.submit("encode", str(run), options=options))}
    assert sorted((end["JobState"], end["ExitCode"]) for end in ends.values()) == [("COMPLETED", "0:0")] * 2 + [("FAILED", "65:0")]
    assert {end["Restarts"] for end in ends.values()} == {"0"} and not (run / "encode" / "done.json").exists()
    (poisoned,) = [task for task, end in ends.items() if end["JobState"] == "FAILED"]
    said = (run / f"encode-{poisoned}.out").read_text()
    assert victim.parent.name in said and "damaged" in said, said
    victim.write_bytes(bytes_)
    (end,) = slurm.wait_for_end(slurm.submit("encode", str(run), options=(*options, "--array=0")))
    assert end["ExitCode"] == "0:0" and (run / "encode" / "done.json").exists()
    row(
        record_property,
        "encode as an array of 3, one image shard damaged",
        "two shares COMPLETED, one FAILED with 65 and named the shard; mended, an array of 1 did what was left and merged",
        since,
    )


def test_the_commands_of_the_cluster_page_bring_the_whole_pipeline(slurm: Cluster, tmp_path: Path, record_property: Record) -> None:
    """The fence of docs/cluster.md, section SLURM: the chain with --dry-run, the chain, one stage of it; and by hand, once it has ended."""
    since = time.monotonic()
    section = (ROOT / "docs" / "cluster.md").read_text().split("## SLURM")[1].split("\n## ")[0]
    by_launcher, by_hand = (
        text.replace("python ", f"{sys.executable} ").replace("runs", str(tmp_path)) for text in re.findall(r"```bash\n(.*?)```", section, re.S)
    )
    said, stages = slurm.run("bash", "-ec", by_launcher), list(used_by(load_run("tiny", [])))
    assert said.count("sbatch --parsable") == len(stages) and re.search(r"^dvae: (job \d+ is in the queue|finished) already", said, re.M), said
    jobs = dict(re.findall(r"^(\w+): job (\d+)$", said, re.M))
    assert list(jobs) == stages, said
    run = tmp_path / "tiny"
    again = slurm.run("bash", "-ec", by_launcher.strip().splitlines()[1])
    queued, done = re.findall(r"^(\w+): job \d+ is in the queue already", again, re.M), [one for one in stages if (run / one / "done.json").exists()]
    assert {*queued, *done} == set(stages) and "sbatch" not in again, again
    for stage, job in jobs.items():
        ends = slurm.wait_for_end(job)
        assert {end["ExitCode"] for end in ends} == {"0:0"}, (stage, ends, [p.read_text() for p in (run / "logs").glob(f"*{stage}-{job}*")])
    assert (run / "report.html").stat().st_size > 1000 and all((run / stage / "done.json").exists() for stage in stages)
    begin = json.loads((run / "exits/dalle/attempt-0/begin.json").read_text())
    assert begin["size"] == 2 and (run / "exits" / "generate.1-of-2").is_dir()
    row(
        record_property,
        "the whole tiny pipeline by demo --on slurm, two nodes for training, arrays of 2",
        "nine jobs COMPLETED, report.html written",
        since,
    )
    slurm.run("bash", "-ec", by_hand, environment={"SBATCH_OUTPUT": f"{tmp_path}/%x-%j.out"})  # its own lies in the repository
    (mine,) = slurm.run("squeue", "--noheader", "--states=all", "--name=mine", "--format=%A").split()
    (end,) = slurm.wait_for_end(mine)
    assert end["ExitCode"] == "0:0" and end["JobName"] == "mine", end


def watched(slurm: Cluster, run: Path, stage: str) -> dict[str, Any]:
    """What ``status`` says of a stage and its shares, on a login node."""
    (found,) = json.loads(slurm.run(sys.executable, "launcher.py", "status", str(run), "--json"))
    first, *shares = [each for each in found["stages"] if each["stage"] == stage]
    return {**first, "shares": shares}


def test_a_job_is_watched_from_its_queue_to_its_end_its_comment_says_how_far_it_is_and_cancel_ends_it(
    slurm: Cluster, calm: Path, run: Path, tmp_path: Path, record_property: Record
) -> None:
    since = time.monotonic()
    often = {"LAUNCHER_LIVE_S": "1", "LAUNCHER_ANNOUNCE_S": "1"}
    drained, resumed = (("scontrol", "update", "nodename=n[1-3]", *state) for state in (("state=drain", "reason=test"), ("state=resume",)))
    words = ["cluster.cpus=1", "cluster.memory_gib=1", "--on", "slurm"]
    more = ["dvae_fit.steps=1000000", "dvae_fit.eval_every=1000000", "--go-on", "cluster.nodes=2"]
    slurm.run(*drained)
    said = slurm.run(sys.executable, "launcher.py", "dvae", str(run), *more, *words, environment=often)
    (job,) = re.findall(r"^dvae: job (\d+)$", said, re.M)
    queued = watched(slurm, run, "dvae")
    assert queued["state"] == "queued" and f"job {job} (PENDING: " in queued["waits"], queued
    slurm.run(*resumed)
    training(slurm, run, 0)
    slurm.wait("signs of life", lambda: len((seen := watched(slurm, run, "dvae"))["heard_s"]) == 2 and seen["done"] > 0)
    live = watched(slurm, run, "dvae")
    assert live["state"] == "running" and live["done"] > 0 and live["total"] == 1_000_000 and live["job"] == job and live["rate"] > 0, live
    row(
        record_property,
        "status of a job that finds no node, then of the same as it runs",
        "queued with SLURM's reason; then step, loss, speed and the age of each rank's sign",
        since,
    )
    since = time.monotonic()
    comment = re.compile(r"^dvae \d+/1000000 .*loss .* ETA ", re.M)
    slurm.wait("the comment", lambda: comment.search(slurm.run("squeue", "--noheader", f"--jobs={job}", "--format=%k")))
    row(record_property, "squeue --format=%k", "step, speed, loss and ETA in the job's comment", since)
    since = time.monotonic()
    (rank,) = [pid for pid in slurm.tasks("n2") if b"--worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(rank, signal.SIGSTOP)
    slurm.wait("the stopped rank", lambda: "rank 1 (node n2) is stopped (SIGSTOP)" in watched(slurm, run, "dvae")["waits"])
    assert time.monotonic() - since < 60
    os.kill(rank, signal.SIGCONT)
    row(record_property, "a rank that is stopped (SIGSTOP)", "named by status with its node", since)
    lines = slurm.run(sys.executable, "launcher.py", "logs", str(run), "--rank", "0").splitlines()
    assert lines and all("[rank 0] " in line for line in lines) and any("/1000000 steps" in line for line in lines)
    since = time.monotonic()
    assert f"dvae: job {job} was told to end" in slurm.run(sys.executable, "launcher.py", "cancel", str(run))
    (end,) = slurm.wait_for_end(job)
    assert end["JobState"] == "CANCELLED"
    slurm.wait("its end", lambda: watched(slurm, run, "dvae")["state"] in ("ended", "killed"))
    row(record_property, "launcher.py cancel RUN", "CANCELLED; status says how the attempt ended", since)
    since = time.monotonic()
    divided = copy(calm, tmp_path / "divided")
    slurm.run(*drained)
    said = slurm.run(sys.executable, "launcher.py", "encode", str(divided), "cluster.shares=2", *words, environment=often)
    assert re.search(r"^encode: job \d+$", said, re.M), said
    assert watched(slurm, divided, "encode")["state"] == "queued"
    slurm.run(*resumed)
    seen: list[dict[str, Any]] = []
    slurm.wait("the shares", lambda: seen.append(watched(slurm, divided, "encode")) or seen[-1]["state"] == "done")  # type: ignore[func-returns-value]
    assert any(each["state"].endswith(" of 2 shares") and each["shares"] for each in seen), seen
    row(record_property, "status of an array of 2", "queued, its shares one by one, done", since)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """Also when whoever started the cluster is killed."""
    hosts, mounts = Path("/etc/hosts").read_text(), Path("/proc/mounts").read_text()
    program = f"import sys; from pathlib import Path; from tests.support.slurm_cluster import Cluster\nwith Cluster(Path({str(tmp_path)!r}), 1): sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=ROOT)
    mark = f"SLURM_LOCAL={tmp_path}".encode()

    def ours() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*") if reads(path / "environ", mark) and path.name != str(process.pid)]

    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "slurmd.n1.pid").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    assert len(ours()) >= 4
    process.kill()
    process.communicate()
    while ours():
        assert time.monotonic() < deadline, ours()
        time.sleep(0.1)
    assert (Path("/etc/hosts").read_text(), Path("/proc/mounts").read_text()) == (hosts, mounts)
