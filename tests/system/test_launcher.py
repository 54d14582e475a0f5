"""The command line from outside: every exit code, through real ranks, and what a user reads with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.agent import Placement, begin
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.patience import PATIENCE_S
from tests.support.processes import ranks_of
from tests.support.root import ROOT
from train import attempt as attempt_module
from train import launch as launch_module
from train.config import load_run

LAUNCHER = str(ROOT / "launcher.py")
_PATIENCE_S = 240


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, LAUNCHER, *words], capture_output=True, text=True, env=os.environ | environment, timeout=_PATIENCE_S, check=False
    )


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, LAUNCHER, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(path: Path, process: subprocess.Popen[str], words: str = "") -> None:
    """Until a file is there, and holds these words."""
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists() or words not in path.read_text():
        assert process.poll() is None, f"ended with {process.returncode} before {path.name} appeared:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Roots share one prepared run by copy: this one has its data, its tokenizer and an untrained rest."""
    root = tmp_path_factory.mktemp("runs")
    for stage in ("prepare", "tokenizer"):
        done = launch(stage, "tiny", f"run.root={root}", "dvae_fit.steps=400", "dvae_fit.save_every=1000", "--nproc", "1")
        assert done.returncode == 0, done.stderr
    return root / "tiny"


def copied(prepared: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the prepared run in a root of its own; its ranks are killed in the end."""
    subprocess.run(["cp", "-r", str(prepared), str(tmp_path / "tiny")], check=True)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["run"]["root"] = str(tmp_path)
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    yield tmp_path / "tiny"
    for pid in ranks_of(tmp_path / "tiny"):
        with contextlib.suppress(ProcessLookupError):  # it ends by itself
            os.kill(pid, signal.SIGKILL)


run = pytest.fixture(copied)


def exits(run: Path, stage: str) -> list[dict[str, object]]:
    folder = RunFolder(str(run))
    return [record for attempt in folder.attempts(stage) for record in sorted(folder.records(stage, attempt), key=lambda record: int(record["rank"]))]


def change(run: Path, **values: object) -> None:
    """Change values of the run's own configuration, as section__key=value."""
    config = json.loads((run / "config.json").read_text())
    for name, value in values.items():
        section, key = name.split("__")
        config[section][key] = value
    (run / "config.json").write_text(json.dumps(config))


def without_end(run: Path) -> None:
    """Let the dVAE's training neither end nor save before it is struck, however late that is."""
    change(run, dvae_fit__steps=1_000_000, dvae_fit__save_every=1_000_000)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nonsense"], 64, "No such command 'nonsense'"),
        (["dvae", "tiny", "--nproc", "two"], 64, "Invalid value for '--nproc'"),
        (["bench", "nonsense"], 64, "benchmark 'nonsense' is not known"),
        (["dvae", "tiny", "dvae.widht=1"], 78, "unknown key; accepted in [dvae]"),
        (["dvae", "tiny", "--on", "k8s"], 78, "--on k8s needs cluster.image"),
        (["dvae", "tiny", "--chain"], 78, "--chain: submits all stages to a scheduler"),
        (["verdict", "nonsense", "tiny"], 64, "stage 'nonsense' is not known"),
        (["dvae", "tiny", "--on", "mars"], 78, "accepted are local, slurm and k8s"),
        (
            [
                "dalle",
                "1.2B",
                "zero.sharding=node",
                "compression.method=powersgd",
                "compression.rank=100",
                "cluster.nodes=4",
                "cluster.gpus=8",
                "--on",
                "slurm",
                "--dry-run",
            ],
            78,
            "compression.rank = 100 does not divide over the 8 processes of a machine; use a multiple of 8.",
        ),
        (["tokenizer", "tiny", "--nproc", "2"], 78, "runs in one process"),
        (["dvae", "tiny", "--nproc", "4", "--on", "slurm"], 78, "a job starts a process for each GPU of its nodes; set cluster.gpus"),
        (["demo", "tiny", "--nproc", "4", "--on", "k8s"], 78, "a job starts a process for each GPU of its nodes; set cluster.gpus"),
        (["dvae", "tiny", "--restarts", "1", "--on", "slurm"], 78, "jobs are started again by the scheduler; set cluster.retries"),
        (["status", "nowhere"], 65, "nowhere is no run folder"),
    ],
)
def test_a_wrong_command_line_ends_with_its_code_and_says_why(words: list[str], code: int, message: str) -> None:
    done = launch(*words)
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_dry_run_shows_the_configuration_and_the_command_and_writes_nothing(tmp_path: Path) -> None:
    done = launch("dalle", "tiny", "dalle.layers=6", f"run.root={tmp_path}/runs", "--dry-run", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "layers = 6    # preset: 4" in done.stdout
    assert f"launcher.py dalle tiny dalle.layers=6 run.root={tmp_path}/runs --nproc 2" in done.stdout and "--worker" in done.stdout
    assert not list(tmp_path.iterdir())
    every = launch("demo", "tiny", f"run.root={tmp_path}/runs", "--dry-run")
    assert every.returncode == 0 and every.stdout.count("launcher.py") >= 9 and not list(tmp_path.iterdir())
    again = launch("demo", "tiny", f"run.root={tmp_path}/runs", "--dry-run", "--restarts", "3")
    assert again.stdout.count(" --restarts 3\n") == every.stdout.count("launcher.py")


def test_an_unwritable_run_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = launch("prepare", "tiny", f"run.root={tmp_path}/file/runs")
    assert done.returncode == 78 and "file/runs" in done.stderr


def test_a_run_folder_of_another_configuration_is_refused_with_the_differences(run: Path) -> None:
    done = launch("dvae", "tiny", f"run.root={run.parent}", "dalle.layers=6")
    assert done.returncode == 78
    assert "dalle.layers: 4 -> 6" in done.stderr and "use another run.name" in done.stderr


@pytest.mark.parametrize(("source", "message"), [("nowhere", "nowhere"), ("empty", "empty")], ids=["missing", "empty"])
def test_missing_and_empty_data_folders_are_data_errors(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    done = launch("prepare", "tiny", f"run.root={tmp_path}", f'data.sources=["{tmp_path}/{source}"]', "--nproc", "1")
    assert done.returncode == 65 and message in done.stderr, done.stderr


def test_a_stage_before_its_input_names_the_command_and_the_code_arrives_through_two_ranks(run: Path) -> None:
    done = launch("encode", str(run), "--nproc", "2")
    assert done.returncode == 65, done.stderr
    assert f"run 'launcher.py dvae {run}' first" in done.stderr
    assert {record["code"] for record in exits(run, "encode")} <= {65, 1, 75}, "one that had not begun is told to stop, and has nothing to lose"


def test_a_batch_that_does_not_divide_is_a_configuration_error_of_the_ranks(run: Path) -> None:
    change(run, dvae_fit__batch=9)
    done = launch("dvae", str(run), "--nproc", "2")
    assert done.returncode == 78 and "dvae_fit.batch = 9 does not divide" in done.stderr, done.stderr


def test_divergence_ends_with_93_and_keeps_the_last_good_checkpoint(run: Path) -> None:
    change(run, dvae_fit__lr=1e30, dvae_fit__lr_final=1e30, dvae_fit__save_every=1)
    done = launch("dvae", str(run), "--nproc", "2")
    assert done.returncode == 93, done.stderr
    assert "3 consecutive updates" in done.stderr and "dvae_fit.lr" in done.stderr
    assert (run / "dvae" / "checkpoints" / "step-00000001" / "meta.json").exists()


def test_a_killed_rank_is_a_crash_and_takes_its_peers_along(run: Path) -> None:
    without_end(run)
    process = start("dvae", str(run), "--nproc", "2")
    wait_for(run / "dvae" / "metrics" / "attempt-0.jsonl", process, "train/loss")
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    output = process.communicate(timeout=_PATIENCE_S)[0]
    assert process.returncode == 1, output
    assert "ended without a record: it was killed" in output
    assert ranks_of(run) == []


def test_a_killed_rank_is_started_again_until_crashes_in_a_row_have_saved_nothing(run: Path) -> None:
    without_end(run)
    process = start("dvae", str(run), "--nproc", "1", "--restarts", "2")
    for attempt in range(3):
        wait_for(run / "dvae" / "metrics" / f"attempt-{attempt}.jsonl", process)
        os.kill(ranks_of(run)[0], signal.SIGKILL)
    output = process.communicate(timeout=_PATIENCE_S)[0]
    assert process.returncode == 93 and output.count("starting the ranks again") == 2, output
    assert "3 crashes in a row without progress" in output and len(list((run / "exits" / "dvae").glob("attempt-*"))) == 3


def test_no_rank_is_started_again_after_a_stop_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, stop = list[int](), StopFlag()

    def crashed(arguments: list[str], placement: Placement, run: RunFolder, stage: str, stop: StopFlag) -> tuple[int, str]:
        calls.append(begin(placement, run, stage))
        stop.received = signal.SIGTERM if len(calls) == 2 else None
        return ExitCode.CRASH, "boom"

    monkeypatch.setattr(attempt_module, "run_ranks", crashed)
    ended = attempt_module.execute("dvae", load_run("tiny", []), RunFolder(str(tmp_path)), Placement(2), stop, restarts=9)
    assert ended == (ExitCode.CRASH, "boom") and calls == [0, 1]


@pytest.mark.parametrize("options", [(signal.SIGUSR2,), (signal.SIGTERM, "--restarts", "1")], ids=["USR2", "TERM, restarts"])
def test_a_stop_signal_saves_and_asks_to_be_requeued_and_the_run_goes_on_to_its_end(run: Path, options: tuple[int, *tuple[str, ...]]) -> None:
    number, *restarts = options
    without_end(run)
    nproc = "1" if restarts else "2"
    process = start("dvae", str(run), "--nproc", nproc, *restarts)
    wait_for(run / "dvae" / "metrics" / "attempt-0.jsonl", process, "train/loss")
    process.send_signal(number)
    output = process.communicate(timeout=_PATIENCE_S)[0]
    assert process.returncode == 75, output
    assert "stopped by a signal after update" in output
    (saved,) = (run / "dvae" / "checkpoints").glob("step-*/meta.json")
    stopped_at = json.loads(saved.read_text())["step"]
    assert {record["code"] for record in exits(run, "dvae")} == {75}
    change(run, dvae_fit__steps=stopped_at + 20)
    done = launch("dvae", str(run), "--nproc", nproc)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(f"dvae: resumed after update {stopped_at}\n") == 1, "notes are the main rank's, and seen"
    again = launch("dvae", str(run))
    assert again.returncode == 0 and "finished already" in again.stdout
    first = json.loads((run / "dvae" / "metrics" / "attempt-1.jsonl").read_text().splitlines()[0])
    assert first["step"] == stopped_at + 1


def test_a_signal_to_ranks_that_have_no_handler_yet_kills_none_and_is_not_lost(run: Path) -> None:
    without_end(run)
    process = start("dvae", str(run), "--nproc", "2")
    wait_for(run / "exits" / "dvae" / "attempt-0" / "begin.json", process)
    deadline = time.monotonic() + _PATIENCE_S
    while len(ranks_of(run)) < 2:  # the moment they exist: Python itself has not started
        assert time.monotonic() < deadline and process.poll() is None
    for pid in ranks_of(run):
        os.kill(pid, signal.SIGUSR2)
    output = process.communicate(timeout=_PATIENCE_S)[0]
    assert process.returncode == 75, output


def test_killing_the_launcher_leaves_no_rank_behind_and_the_lock_is_free(run: Path) -> None:
    without_end(run)
    process = start("dvae", str(run), "--nproc", "2")
    wait_for(run / "dvae" / "metrics" / "attempt-0.jsonl", process, "train/loss")
    second = launch("dvae", str(run), "--nproc", "2")
    assert second.returncode == 78 and "another launcher runs 'dvae'" in second.stderr
    ranks = ranks_of(run)
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + PATIENCE_S
    while ranks_of(run):
        assert time.monotonic() < deadline, "ranks outlived their launcher"
        time.sleep(0.05)
    change(run, dvae_fit__steps=2)
    assert launch("dvae", str(run), "--nproc", "2").returncode == 0


def test_a_stage_of_one_process_refuses_a_job_of_two_nodes(tmp_path: Path) -> None:
    job = {"LAUNCHER_JOB": "7", "LAUNCHER_NODE": "1", "LAUNCHER_NODES": "2", "LAUNCHER_RENDEZVOUS": "127.0.0.1:29500"}
    done = launch("tokenizer", "tiny", f"run.root={tmp_path}", **job)
    assert done.returncode == 78 and "stage 'tokenizer' runs in one process, and this job has 2 nodes" in done.stderr


def test_a_launcher_that_was_killed_is_named_by_the_one_that_started_it(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(launch_module.StageFailed, match="dvae: killed by signal 9; run the same command again") as failed:
        launch_module._run_child([sys.executable, str(script), "dvae"], StopFlag())
    assert failed.value.exit_code == ExitCode.CRASH


def test_a_benchmark_writes_its_figures_as_json(tmp_path: Path) -> None:
    done = launch("bench", "floor", "--out", str(tmp_path), "--seconds", "0.02")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("floor-*.json")
    assert done.stdout.strip() == str(file) and json.loads(file.read_text())["measured"]


def test_status_shows_each_stage(run: Path) -> None:
    done = launch("status", str(run))
    assert done.returncode == 0, done.stderr
    assert "prepare" in done.stdout + done.stderr and "done" in done.stdout + done.stderr
