"""Jobs: a launcher's place in one, the ledger of attempts and the verdict that follows, the watchdog, where time went. About 10 s."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import ledger, storage
from infra.errors import ConfigError, DivergedError
from infra.job import FIRST_PORT, PORTS, ClusterConfig, Job, JobSpec, expand_hosts, port
from infra.ledger import Attempt, crashes_in_a_row, judge
from infra.run_folder import RunFolder
from infra.world import World
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.config import load_run
from train.loop.goodput import Goodput, lost_s, process_age_s
from train.ranks.watchdog import Watchdog
from train.run import elastic
from train.run.cluster import Start, verdict
from train.run.elastic import accumulation
from train.run.stage_table import STAGES, TRAINED

TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURMD_NODENAME": "gpu08",
}
POD = {"LAUNCHER_JOB": "uid", "LAUNCHER_NODES": "2", "LAUNCHER_NODE": "1", "LAUNCHER_RENDEZVOUS": "a-0.a:29400", "LAUNCHER_ADDRESS": "a-1.a"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],gpu05", ["n1", "n2", "n3", "n7", "gpu05"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[098-101]-ib", ["a098-ib", "a099-ib", "a100-ib", "a101-ib"]),
    ],
)
def test_host_lists_expand_as_slurm_writes_them(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=8), st.integers(1, 4))
def test_a_host_list_names_as_many_hosts_as_it_has_numbers(numbers: list[int], width: int) -> None:
    text = f"node[{','.join(f'{n:0{width}d}' for n in numbers)}],last"
    assert expand_hosts(text) == [f"node{n:0{width}d}" for n in numbers] + ["last"]


@pytest.mark.parametrize(("text", "message"), [("n[1-", "not a host list"), ("n[a-b]", "not a host list"), ("", "names no host")])
def test_what_is_no_host_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand_hosts(text)


def test_a_launcher_knows_its_place_under_each_scheduler() -> None:
    assert Job.from_env({}) == Job() and Job().run_id == ""
    assert Job.from_env(TASK) == Job("77", 0, 1, 2, f"gpu07:{FIRST_PORT + 77}", "gpu08")
    assert Job.from_env(TASK | {"SLURM_RESTART_COUNT": "3"}).run_id == "77.3"
    assert Job.from_env(POD) == Job("uid", 0, 1, 2, "a-0.a:29400", "a-1.a")
    # A batch script, also where SLURM numbers its step, and an interactive shell are no tasks of srun.
    for step in ("", "4294967291"):
        assert Job.from_env(TASK | {"SLURM_STEP_ID": step}) == Job()


def test_helpers_of_a_launcher_survive_the_signal_that_slurm_sends_to_every_process() -> None:
    program = (
        "import os, signal, subprocess, time; from infra import signals\n"
        "flag = signals.install(); helper = subprocess.Popen(['sleep', '60'])\n"
        "os.killpg(0, signal.SIGUSR2)\n"
        "while not flag: time.sleep(0.01)\n"
        "time.sleep(0.3); print(flag.received.name, helper.poll()); helper.terminate(); print(helper.wait())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT, start_new_session=True)
    assert done.stdout.split() == ["SIGUSR2", "None", "-15"], done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({k: v for k, v in TASK.items() if k != "SLURM_STEP_NODELIST"}, "'' names no host"),
        (TASK | {"SLURM_NODEID": "x"}, "inside srun, but SLURM_NODEID = 'x'"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "16"}, "16 tasks on 2 nodes: one launcher for each node"),
        (POD | {"LAUNCHER_NODE": "2"}, "node 2 of 2"),
        (POD | {"LAUNCHER_NODE": "one"}, "LAUNCHER_NODE = 'one': accepted is a whole number"),
        (POD | {"LAUNCHER_RENDEZVOUS": ""}, "needs LAUNCHER_RENDEZVOUS"),
    ],
)
def test_half_a_declaration_is_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Job.from_env(env)


def test_ports_and_names_of_jobs_differ() -> None:
    assert port("12345678") == FIRST_PORT + 5678 and FIRST_PORT + PORTS <= 32768
    names = {JobSpec(s, r, f"/runs/{r}", "node", ClusterConfig()).name for s in ("dvae", "dalle") for r in ("A", "a", "x" * 60, "_")}
    assert len(names) == 8 and all(len(name) <= 45 and name.replace("-", "").isalnum() and name == name.lower() for name in names)


def test_every_stage_has_needs_that_come_before_it() -> None:
    assert TRAINED == ("dvae", "dalle", "align", "clip")
    for stage, entry in STAGES.items():
        assert all(list(STAGES).index(need) < list(STAGES).index(stage) for need in entry.needs)
        assert entry.needs or stage == "prepare"


def attempts(*words: str) -> list[Attempt]:
    """'1@5r0': code 1, begun from step 5, restart 0."""
    found = []
    for number, word in enumerate(words):
        code, rest = word.split("@")
        saved, restart = rest.split("r")
        found.append(Attempt(number, f"7.{restart}", int(restart), int(code), f"reason {number}", int(saved)))
    return found


@pytest.mark.parametrize(
    ("words", "saved", "code"),
    [
        (["0@-1r0"], 20, 0),
        (["75@-1r0"], 20, 75),
        (["64@-1r0"], -1, 64),
        (["65@-1r0"], -1, 65),
        (["78@-1r0"], -1, 78),
        (["93@-1r0"], -1, 93),
        (["1@-1r0"], -1, 75),
        (["1@-1r0", "1@-1r1", "1@-1r2"], -1, 75),
        (["1@-1r0", "1@-1r1", "1@-1r2", "1@-1r3"], -1, 93),
        (["1@-1r0", "1@-1r1", "1@-1r2", "1@-1r3"], 5, 75),  # the last one saved something
        (["1@-1r0", "1@-1r1", "1@5r2", "1@5r3", "1@5r4", "1@5r5"], 5, 93),
        (["1@-1r0", "1@-1r1", "1@-1r2", "75@-1r3", "1@-1r4"], -1, 75),  # consecutive
        (["1@-1r0", "1@-1r1", "1@-1r2", "1@-1r3", "1@-1r0"], -1, 75),  # a new submission counts afresh
        ([], -1, 1),
    ],
)
def test_the_verdict_follows_from_the_ledger(words: list[str], saved: int, code: int) -> None:
    assert judge(attempts(*words), saved, retries=3).code == code


@given(st.lists(st.tuples(st.sampled_from([0, 1, 75]), st.integers(0, 3)), min_size=1, max_size=12))
def test_crashes_in_a_row_never_reach_past_a_good_end(history: list[tuple[int, int]]) -> None:
    found = [Attempt(i, "", 1 if i else 0, code, "", saved) for i, (code, saved) in enumerate(history)]
    count = crashes_in_a_row(found, found[-1].saved)
    assert 0 <= count <= len(found) and all(a.code == 1 for a in found[len(found) - count :])


def test_the_ledger_is_read_from_records_and_kept(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for restart, code in enumerate((1, 75, None)):
        number = run.begin_attempt("dvae", size=2, restart=restart, run_id=f"7.{restart}", saved=-1)
        for rank in range(2):
            if code is not None:
                run.record_exit("dvae", number, rank, code, f"reason {code}")
    found = ledger.read(run, "dvae")
    assert [(a.code, a.run_id) for a in found] == [(1, "7.0"), (75, "7.1"), (1, "7.2")] and "killed" in found[2].reason
    assert verdict("dvae", run, Start("7", 2, 137), 3).code == 75
    end = json.loads((tmp_path / "exits/dvae/attempt-2/end.json").read_text())
    assert end["code"] == 1
    (tmp_path / "dvae/checkpoints/step-00000040").mkdir(parents=True)
    (tmp_path / "dvae/checkpoints/step-00000040/meta.json").write_text("{}")
    assert ledger.newest_checkpoint(run, "dvae") == 40 and ledger.newest_checkpoint(run, "clip") == -1


def test_a_restart_reads_what_decides_and_each_rank_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, read, ranks = RunFolder(str(tmp_path)), [0], 8
    real = storage.read_json

    def counted(url: str) -> object:
        read[0] += 1
        return real(url)

    monkeypatch.setattr(storage, "read_json", counted)
    counts = []
    for restart in range(12):
        number = run.begin_attempt("dvae", size=ranks, restart=restart, run_id=f"7.{restart}", saved=restart)
        for rank in range(ranks):
            run.record_exit("dvae", number, rank, 1 if restart % 4 else 75, f"reason {restart}")
        read[0] = 0
        ledger.refuse_a_crash_loop(run, "dvae", restart + 1, 100)
        counts.append(read[0])
    assert max(counts) <= ranks + 1 + 2 * 4, counts  # the last attempt's ranks, and two small files of each crash since the last good end
    assert [attempt.code for attempt in ledger.read(run, "dvae")] == [1 if restart % 4 else 75 for restart in range(12)]


def test_a_start_whose_work_was_taken_over_is_no_crash(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for run_id in ("7.0", "7.1"):
        run.begin_attempt("dvae", size=1, run_id=run_id, saved=-1)
    found = verdict("dvae", run, Start("7", 0, 137), 0)
    assert found.code == 75 and "attempt 1, by job 7.1, has begun since: this one has lost the work" in found.reason


@pytest.mark.parametrize(("code", "restart", "expected"), [(78, 0, 78), (0, 0, 0), (75, 1, 75), (1, 0, 75), (137, 2, 75), (137, 3, 93)])
def test_what_ends_before_an_attempt_is_judged_by_sruns_code(tmp_path: Path, code: int, restart: int, expected: int) -> None:
    assert verdict("dvae", RunFolder(str(tmp_path)), Start("7", restart, code), 3).code == expected


def test_a_scheduler_that_restarts_by_itself_is_stopped_by_code_93(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for restart in range(3):
        number = run.begin_attempt("dvae", size=1, restart=restart, saved=-1)
        run.record_exit("dvae", number, 0, 1, "boom")
        ledger.refuse_a_crash_loop(run, "dvae", restart + 1, 3)
    with pytest.raises(DivergedError, match=r"3 crashes in a row without progress, the last: rank 0: boom; not started again"):
        ledger.refuse_a_crash_loop(run, "dvae", 3, 2)
    ledger.refuse_a_crash_loop(run, "dvae", 0, 2)  # a new submission


def test_launchers_wait_for_the_records_of_all_nodes_or_for_one_that_says_enough(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    number = run.begin_attempt("dvae", size=2)
    run.record_exit("dvae", number, 0, 75, "saved")
    threading.Timer(1.0, run.record_exit, args=("dvae", number, 1, 75, "saved")).start()
    started = time.monotonic()
    run.wait_for_records("dvae", number, 2, timeout_s=PATIENCE_S)
    assert 0.3 < time.monotonic() - started < 19 and run.root_cause("dvae", number, 2)[0] == 75
    number = run.begin_attempt("dvae", size=2)
    run.record_exit("dvae", number, 0, 78, "wrong")
    run.wait_for_records("dvae", number, 2, timeout_s=PATIENCE_S)
    started = time.monotonic()
    run.wait_for_records("dvae", run.begin_attempt("dvae"), 2, timeout_s=0.2)
    assert time.monotonic() - started < 19


def test_a_stuck_rank_ends_in_time_and_says_where_it_stood() -> None:
    said: list[tuple[int, str]] = []
    ended = threading.Event()
    watchdog = Watchdog(1.0, lambda code, reason: said.append((code, reason)), lambda code: ended.set())
    time.sleep(1.5)
    assert not said, "it sleeps until the first beat"
    watchdog.beat()
    time.sleep(0.1)
    watchdog.beat(patience=3)
    time.sleep(1.5)
    assert not said, "a patient beat lasts longer"
    watchdog.rest()
    time.sleep(1.5)
    assert not said
    watchdog.beat()
    assert ended.wait(PATIENCE_S)
    ((code, reason),) = said
    assert code == 1 and "no progress for 1 s; it stands at tests/infra/test_job.py" in reason
    assert "inside wait (threading.py)" in reason


def test_the_watchdog_ends_a_process_that_nothing_else_would(tmp_path: Path) -> None:
    program = (
        "import os, threading; from train.ranks import watchdog\n"
        "os.environ['LAUNCHER_HANG_S'] = '0.3'\n"
        "watchdog.start(lambda code, reason: print(reason, flush=True)); watchdog.beat(); threading.Lock().acquire(); threading.Event().wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, cwd=ROOT)
    assert done.returncode == 1 and "no progress for" in done.stdout and "Thread" in done.stderr


def test_goodput_adds_up_and_names_what_was_lost(tmp_path: Path) -> None:
    assert 0 < process_age_s() < 100_000
    goodput = Goodput(lost_s=2.0, age_s=1.0)
    goodput.add("step", 6.0)
    goodput.add("data", 0.5)
    with goodput.timing("save"):
        time.sleep(0.01)
    assert goodput.seconds["save"] >= 0.01
    goodput.seconds["save"] = 0.01
    assert goodput.share == pytest.approx(6 / 9.5, rel=0.01)
    assert goodput.line("dvae").startswith("dvae: goodput 63 %: init 1.0 s, data 0.5 s, step 6.0 s, evaluate 0.0 s, save 0.0 s, lost 2.0 s")
    assert goodput.metrics()["goodput/step_s"] == 6.0
    folder = tmp_path / "dvae" / "metrics"
    folder.mkdir(parents=True)
    assert lost_s(str(tmp_path), "dvae", 0) == 0
    (folder / "attempt-0.jsonl").write_text("".join(json.dumps({"step": s, "time": 100.0 + s, "values": {}}) + "\n" for s in range(1, 9)))
    assert lost_s(str(tmp_path), "dvae", 5) == 3.0 and lost_s(str(tmp_path), "dvae", 8) == 0.0 and lost_s(str(tmp_path), "dvae", 0) == 7.0
    # The attempt crashed 12 s after its last line: a hung rank was waited for. One that began later, or was stopped in order, tells nothing.
    for attempt, (began, code, ended) in enumerate([(90.0, 75, 300.0), (99.0, 1, 120.0)]):
        exits = tmp_path / "exits" / "dvae" / f"attempt-{attempt}"
        exits.mkdir(parents=True)
        (exits / "begin.json").write_text(json.dumps({"time": began}))
        assert lost_s(str(tmp_path), "dvae", 5) == 3.0, "without records"
        (exits / "rank-0.json").write_text(json.dumps({"rank": 0, "code": code, "reason": "", "time": ended}))
        assert lost_s(str(tmp_path), "dvae", 5) == (3.0 if code == 75 else 15.0)
    (exits / "begin.json").write_text(json.dumps({"time": 110.0}))
    assert lost_s(str(tmp_path), "dvae", 5) == 3.0


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_any_number_of_ranks_keeps_the_batch_and_grows_no_micro_batch(share: int, ranks: int, rows: int) -> None:
    batch = share * ranks
    count = accumulation(batch, ranks, rows)
    assert count is not None and batch % (ranks * count) == 0 and batch // (ranks * count) <= rows
    assert accumulation(batch, ranks, batch // (ranks * count)) == count
    assert accumulation(batch * 2 + 1, 2, rows) is None


def test_a_run_on_fewer_ranks_accumulates(tmp_path: Path) -> None:
    run, cfg = RunFolder(str(tmp_path)), load_run("tiny", [])
    four, two, eight = (World(0, size, 0, size) for size in (4, 2, 8))
    assert elastic.adapted(cfg, run, "dvae", four).dvae_fit.accumulation == 1
    fewer = elastic.adapted(cfg, run, "dvae", two).dvae_fit
    assert (fewer.accumulation, fewer.batch) == (2, cfg.dvae_fit.batch)
    assert elastic.adapted(cfg, run, "dvae", eight).dvae_fit.accumulation == 1
    assert elastic.adapted(cfg, run, "dvae", World(0, 3, 0, 3)) is cfg, "refused later, by name"
    assert elastic.adapted(cfg, run, "prepare", two) is cfg
