"""SLURM: what sbatch is asked, what the job scripts do with every end, and two nodes preempted in mid-run; with stand-ins for the commands. About 90 s.

test_slurm_real.py runs the same on a real SLURM, where one can be started.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import slurm_submit
from infra.errors import ConfigError
from infra.job import ClusterConfig, JobSpec
from tests.support import slurm_stand_in as stand_in
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from tests.support.slurm_cluster import missing
from train.loop.metrics import read_metrics
from train.run import slurm_scripts

SCRIPTS = sorted((ROOT / "infra" / "slurm").glob("*.sbatch"))
STAGES = ("prepare", "tokenizer", "dvae", "encode", "dalle", "clip", "generate", "evaluate", "report")


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launcher.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=PATIENCE_S,
        check=False,
    )


def option(arguments: list[str], name: str) -> str | None:
    return next((word.removeprefix(f"--{name}=") for word in arguments if word.startswith(f"--{name}=")), None)


def test_every_stage_has_a_script_that_asks_for_requeue_signal_and_appended_output() -> None:
    assert sorted(path.stem for path in SCRIPTS) == sorted([*STAGES, "align"])
    for path in SCRIPTS:
        text = path.read_text()
        for line in ("--requeue", "--signal=USR2@720", "--open-mode=append", "--ntasks-per-node=1", f"--job-name={path.stem}"):
            assert f"#SBATCH {line}\n" in text, path.name
        assert f'run_stage {path.stem} "$@"' in text and ("--array" in text) == (path.stem in ("prepare", "encode", "generate"))


def test_the_scripts_are_the_template_filled_in() -> None:
    assert {path.name: path.read_text() for path in SCRIPTS} == slurm_scripts.scripts(), "run: python launcher.py docs"


def test_shellcheck_finds_nothing() -> None:
    scripts = [*SCRIPTS, ROOT / "infra/slurm/job.sh", ROOT / ".ci/run", *(ROOT / "infra/docker").glob("*.sh"), *(ROOT / "tests").rglob("*.sh")]
    checker = str(Path(sys.executable).parent / "shellcheck")
    done = subprocess.run([checker, "-x", "-P", str(ROOT), *map(str, scripts)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_the_chain_is_submitted_once_each_stage_after_those_it_needs(tmp_path: Path) -> None:
    env = stand_in.install(tmp_path / "slurm")
    batches = [f"{stage}_fit.batch=24" for stage in ("dvae", "dalle", "clip")]
    words = ["demo", "tiny", f"run.root={tmp_path}", *batches, "cluster.nodes=3", "cluster.gpus=8", "cluster.shares=5", "--on", "slurm"]
    shown = launch(*words, "--dry-run", **env)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("sbatch --parsable") == 9 and "--dependency=afterok:JOB_tokenizer:JOB_encode" in shown.stdout
    assert "run_stage dalle" in shown.stdout and not (tmp_path / "tiny").exists()
    tested = stand_in.calls(tmp_path / "slurm", "sbatch")
    assert len(tested) == 9 and all("--test-only" in arguments and option(arguments, "dependency") is None for arguments in tested)
    assert shown.stdout.count("# sbatch --test-only: sbatch: Job 7 to start at 2026-11-29T12:00:00") == 9
    first = launch(*words, **env)
    assert first.returncode == 0, first.stderr
    sent = stand_in.calls(tmp_path / "slurm", "sbatch")[len(tested) :]
    assert [Path(arguments[-2]).stem for arguments in sent] == list(STAGES)
    ids = {stage: str(1000 + index) for index, stage in enumerate(STAGES)}
    assert [option(arguments, "dependency") for arguments in sent] == [
        None,
        *(f"afterok:{':'.join(ids[need] for need in needs)}" for needs in (["prepare"], ["prepare"], ["dvae"], ["tokenizer", "encode"])),
        *(f"afterok:{':'.join(ids[need] for need in needs)}" for needs in (["tokenizer"], ["dalle", "clip"], ["dalle", "clip"])),
        f"afterok:{ids['generate']}:{ids['evaluate']}",
    ]
    dalle, encode = sent[4], sent[3]
    assert dalle[-1] == str(tmp_path / "tiny") and (tmp_path / "tiny" / "config.json").exists() and (tmp_path / "tiny" / "logs").is_dir()
    asked = {name: option(dalle, name) for name in ("nodes", "gpus-per-node", "time", "signal", "array", "output")}
    assert asked == {
        "nodes": "3",
        "gpus-per-node": "8",
        "time": "24:00:00",
        "signal": "USR2@720",
        "array": None,
        "output": f"{tmp_path}/tiny/logs/%x-%j.out",
    }
    assert (option(encode, "nodes"), option(encode, "array")) == ("1", "0-4") and "--kill-on-invalid-dep=yes" in encode
    again = launch(*words, **env)
    assert again.stdout.count("is in the queue already (PENDING: Resources)") == 9 and len(stand_in.calls(tmp_path / "slurm", "sbatch")) == 18
    words = ["dvae", str(tmp_path / "tiny"), "cluster.nodes=3", "cluster.gpus=8", "cluster.shares=5", "--on", "slurm"]
    assert "dvae: job 1002 is in the queue already" in launch(*words, **env).stdout, "another size is no other run"
    other = launch(*words, "cluster.nodes=1", **env)
    assert other.returncode == 78, "what was asked for is not dropped in silence"
    assert "job 1002 is in the queue (PENDING: Resources) and asks for --nodes=3, not for --nodes=1: cancel it first (scancel 1002" in other.stderr
    record = json.loads((tmp_path / "tiny" / "jobs" / "dvae.json").read_text())
    assert (record["scheduler"], record["job"]) == ("slurm", "1002") and "--nodes=3" in record["asked"]


def test_the_site_file_reaches_sbatch_and_refusals_reach_the_user(tmp_path: Path) -> None:
    env = stand_in.install(tmp_path / "slurm")
    assert launch("prepare", "tiny", f"run.root={tmp_path}", "--on", "slurm", **env).returncode == 0
    (seen,) = stand_in.environments(tmp_path / "slurm", "sbatch")
    assert seen["LAUNCHER_RUNTIME"] == "venv" and seen["LAUNCHER_HOME"] == str(ROOT) and seen["LAUNCHER_RETRIES"] == "3"
    (tmp_path / "slurm" / "refuse").touch()
    refused = launch("dvae", "tiny", f"run.root={tmp_path}", "--on", "slurm", **env)
    assert refused.returncode == 78 and "invalid partition specified" in refused.stderr
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "git"):  # SLURM may be installed beside them
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    absent = launch("dvae", "tiny", f"run.root={tmp_path}", "--on", "slurm", PATH=str(tmp_path / "bin"))
    assert absent.returncode == 78 and "squeue is not installed here" in absent.stderr
    local = launch("dvae", "tiny", f"run.root={tmp_path}", "--chain")
    assert local.returncode == 78 and "'launcher.py demo' runs them in turn" in local.stderr
    finished = tmp_path / "tiny" / "dvae" / "done.json"
    finished.parent.mkdir()
    finished.write_text("{}")
    assert "finished already" in launch("dvae", "tiny", f"run.root={tmp_path}", "--on", "slurm", **env).stdout


def test_a_stage_waits_for_what_makes_its_inputs_and_is_refused_where_nothing_does(tmp_path: Path) -> None:
    env = stand_in.install(tmp_path / "slurm")
    words = ("tiny", f"run.root={tmp_path}", "--on", "slurm")
    alone = launch("tokenizer", *words, **env)
    assert alone.returncode == 65 and "tokenizer needs what 'prepare' makes, which has not finished and is in no queue" in alone.stderr
    assert "--on slurm' first (a new run: with its preset and values in place of the folder)" in alone.stderr
    assert "--chain submits what is missing too" in alone.stderr and not stand_in.calls(tmp_path / "slurm", "sbatch")
    for stage in ("prepare", "tokenizer"):
        assert launch(stage, *words, **env).returncode == 0
    assert option(stand_in.calls(tmp_path / "slurm", "sbatch")[1], "dependency") == "afterok:1000"


def test_a_time_limit_within_the_grace_is_refused_and_one_of_half_an_hour_is_not(tmp_path: Path) -> None:
    def asked(hours: float) -> list[str]:
        return slurm_submit.sbatch(JobSpec("dvae", "tiny", str(tmp_path), "gang", ClusterConfig(hours=hours)))

    for hours in (0.2, 0.1):
        with pytest.raises(ConfigError, match=rf"cluster\.hours = {hours} .*is not longer than cluster\.grace_s = 720: .* above 0\.2, or a smaller"):
            asked(hours)
    assert [option(asked(hours), "time") for hours in (0.5, 1.0125, 24)] == ["0:30:00", "1:00:45", "24:00:00"]


@pytest.mark.parametrize(("export", "given"), [("", None), ("ALL", None), ("NONE", ""), ("MODULES,ALL_OF_IT", "MODULES,ALL_OF_IT,")])
def test_what_jobs_need_reaches_them_where_a_site_exports_nothing(monkeypatch: pytest.MonkeyPatch, export: str, given: str | None) -> None:
    monkeypatch.setenv("SBATCH_EXPORT", export)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://s3")
    words = slurm_submit._exports()
    if given is None:
        assert words == []
        return
    names = words[0].removeprefix("--export=").split(",")
    assert words[0].startswith(f"--export={given}") and {"PATH", "S3_ENDPOINT_URL", "LAUNCHER_HOME", "LAUNCHER_RETRIES"} <= set(names)
    assert "export SLURM_EXPORT_ENV=ALL" in (ROOT / "infra/slurm/job.sh").read_text(), "srun would keep them from its tasks"


# What python does in the next tests: as the launcher, it writes what it was given and ends with $END; as the verdict, with $VERDICT.
PYTHON = """#!/bin/bash
echo "python $*" >> "$STAND_IN/python"
[ "$2" = verdict ] && { echo "code $LAUNCHER_CODE" >> "$STAND_IN/python"; exit "${VERDICT:-0}"; }
grep SigBlk /proc/self/status >> "$STAND_IN/python"
[ -z "${PATIENT:-}" ] || exec "$REAL" -c "import os, signal; open(os.environ['STAND_IN'] + '/ready', 'w'); signal.sigwait([signal.SIGUSR2]); exit($PATIENT)"
exit "${END:-0}"
"""


def batch(folder: Path, *words: str, script: str = "dalle", **environment: str) -> subprocess.Popen[str]:
    """Run a job script as slurmd would, with a Python of our own."""
    env = stand_in.install(folder)
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "python").write_text(PYTHON)
    (folder / "venv" / "bin" / "python").chmod(0o755)
    env |= stand_in.batch_environment(folder) | {"LAUNCHER_VENV": str(folder / "venv"), "REAL": sys.executable} | environment
    command = ["bash", str(ROOT / "infra" / "slurm" / f"{script}.sbatch"), *words]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def requeues(folder: Path) -> list[list[str]]:
    return [call for call in stand_in.calls(folder, "scontrol") if call[0] != "show"]


@pytest.mark.parametrize(
    ("end", "verdict", "restart", "code", "requeued"),
    [
        (0, 0, 0, 0, False),
        (64, 64, 0, 64, False),
        (65, 65, 0, 65, False),
        (78, 78, 0, 78, False),
        (93, 93, 0, 93, False),
        (75, 75, 0, 75, True),
        (1, 75, 0, 75, True),
        (137, 75, 5, 75, True),
        (75, 0, 0, 0, False),  # the ledger decides, not srun
        (1, 1, 0, 75, True),  # no verdict: retried as a crash
        (1, 1, 3, 1, False),
    ],
)
def test_a_job_script_ends_as_the_verdict_says(tmp_path: Path, end: int, verdict: int, restart: int, code: int, requeued: bool) -> None:
    restarts = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
    process = batch(tmp_path / "slurm", "RUN", "dalle_fit.lr=1", END=str(end), VERDICT=str(verdict), **restarts)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == code, output
    assert requeues(tmp_path / "slurm") == ([["requeue", "4242"]] if requeued else [])
    said = (tmp_path / "slurm" / "python").read_text()
    assert "python launcher.py dalle RUN dalle_fit.lr=1" in said and "python launcher.py verdict dalle RUN dalle_fit.lr=1" in said
    assert f"code {end}" in said and f"restart {restart}" in output
    blocked = int(next(line for line in said.splitlines() if "SigBlk" in line).split()[1], 16)
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        assert blocked & 1 << (number - 1), f"{number!r} could kill a launcher that has no handler yet"


def test_a_run_folder_is_meant_where_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for number, (given, meant) in enumerate((("runs/mine", f"{tmp_path}/runs/mine"), ("tiny", "tiny"), ("s3://b/runs/mine", "s3://b/runs/mine"))):
        folder = tmp_path / f"slurm-{number}"
        process = batch(folder, given, "dalle_fit.lr=1", END="0", VERDICT="0", LAUNCHER_HOME=str(ROOT), SLURM_SUBMIT_DIR=str(tmp_path))
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0, output
        assert f"python launcher.py dalle {meant} dalle_fit.lr=1" in (folder / "python").read_text()


@pytest.mark.parametrize(
    ("script", "given", "share"), [("encode", {}, "1/3"), ("encode", {"LAUNCHER_SHARE": "0/1"}, "0/1"), ("prepare", {}, "1/3"), ("dalle", {}, None)]
)
def test_the_tasks_of_an_array_divide_what_can_be_divided(tmp_path: Path, script: str, given: dict[str, str], share: str | None) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "3"}
    process = batch(tmp_path / "slurm", "RUN", script=script, END="0", VERDICT="0", **array, **given)
    assert process.wait(timeout=PATIENCE_S) == 0
    assert [env.get("LAUNCHER_SHARE") for env in stand_in.environments(tmp_path / "slurm", "srun")] == [share]


def test_a_job_that_was_started_again_elsewhere_is_not_requeued_by_its_orphan(tmp_path: Path) -> None:
    process = batch(tmp_path / "slurm", "RUN", END="75", VERDICT="75", SLURM_RESTART_COUNT="1", JOB_RESTARTS="2")
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 75 and "runs elsewhere by now (restart 2)" in output and not requeues(tmp_path / "slurm")


def test_a_job_that_slurm_is_ending_is_not_requeued(tmp_path: Path) -> None:
    process = batch(tmp_path / "slurm", "RUN", END="75", VERDICT="75", JOB_STATE="COMPLETING")
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 75 and "verdict 75" in output and not requeues(tmp_path / "slurm")


def until_ready(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (folder / "ready").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM], ids=["USR2", "TERM"])
def test_a_batch_script_passes_usr2_on_and_survives_term(tmp_path: Path, number: int) -> None:
    process = batch(tmp_path / "slurm", "RUN", PATIENT="75", VERDICT="75")
    until_ready(process, tmp_path / "slurm")
    process.send_signal(number)
    if number == signal.SIGTERM:  # scancel sends it to everything; the ranks have had theirs
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 75 and "srun ended with 75" in output
    assert requeues(tmp_path / "slurm") == [["requeue", "4242"]]


def test_srun_may_end_while_usr2_is_passed_on(tmp_path: Path) -> None:
    """What bash's interrupted wait says is no code of srun: without a ledger, a wrong configuration would be requeued."""
    kill = '() { builtin kill "$@" || return; if [ "$1" = -USR2 ]; then while builtin kill -0 "$2" 2> /dev/null; do sleep .05; done; fi; }'
    process = batch(tmp_path / "slurm", "RUN", PATIENT="78", VERDICT="78", **{"BASH_FUNC_kill%%": kill})
    until_ready(process, tmp_path / "slurm")
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 78 and "srun ended with 78" in output, output


def test_containers_wrap_the_launcher_by_one_variable(tmp_path: Path) -> None:
    for name, runtime in (("a", "apptainer"), ("b", "pyxis"), ("c", "docker")):
        folder = tmp_path / name
        process = batch(folder, "RUN", LAUNCHER_RUNTIME=runtime, LAUNCHER_IMAGE="image.sif", LAUNCHER_MOUNTS="/data", VERDICT="0")
        output = process.communicate(timeout=PATIENCE_S)[0]
        asked = stand_in.calls(folder, "srun")
        if runtime == "apptainer":
            assert ["apptainer", "exec", "--nv", "--bind", f"{ROOT},/data", "image.sif", "python", "launcher.py"] == asked[0][7:15], asked
        elif runtime == "pyxis":
            assert {"--container-image=image.sif", f"--container-mounts={ROOT}:{ROOT},/data"} <= set(asked[0])
            assert asked[1][-4:] == ["launcher.py", "verdict", "dalle", "RUN"] and "--container-image=image.sif" in asked[1]
        else:
            assert process.returncode == 78 and "accepted are venv, apptainer and pyxis" in output and not asked


def venv(folder: Path) -> str:
    """An environment whose python is this one."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return str(folder)


def losses(run: Path) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read_metrics(str(run), "dvae")["train/loss"]]


@pytest.mark.skipif(not missing(), reason="test_slurm_real.py does this on a real SLURM")
def test_two_nodes_preempted_by_usr2_save_requeue_and_go_on_to_the_same_losses(tmp_path: Path) -> None:
    """The real launcher, one on each of two addresses, through the real job script; then the same run undisturbed on one node with two ranks."""
    done = launch("prepare", "tiny", f"run.root={tmp_path}", "dvae_fit.steps=40", "dvae_fit.eval_every=40", "--nproc", "1")
    assert done.returncode == 0, done.stderr
    run, calm = tmp_path / "tiny", tmp_path / "calm" / "tiny"
    shutil.copytree(run, calm)
    env = stand_in.install(tmp_path / "slurm") | {"LAUNCHER_VENV": venv(tmp_path / "venv"), "CUDA_VISIBLE_DEVICES": "0"}  # one rank a node
    script = ["bash", str(ROOT / "infra/slurm/dvae.sbatch"), str(run)]

    def start(restart: int) -> subprocess.Popen[str]:
        facts = stand_in.batch_environment(tmp_path / "slurm", nodes=2, restart=restart, job=str(os.getpid()))
        return subprocess.Popen(script, env=os.environ | env | facts, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    process = start(0)
    deadline = time.monotonic() + 200
    metrics = run / "dvae" / "metrics" / "attempt-0.jsonl"
    while not metrics.exists() or "train/loss" not in metrics.read_text():  # before the first update a stop has nothing to save
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR2)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 75 and "verdict 75" in output, output
    assert "stopped by a signal after update" in output and "[rank 0] dvae: goodput" in output
    begin = json.loads((run / "exits/dvae/attempt-0/begin.json").read_text())
    assert (begin["size"], begin["run_id"]) == (2, f"{os.getpid()}.0")
    assert json.loads((run / "exits/dvae/attempt-0/end.json").read_text())["code"] == 75
    process = start(1)
    output = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, output
    config = json.loads((calm / "config.json").read_text())
    config["run"]["root"] = str(calm.parent)
    (calm / "config.json").write_text(json.dumps(config))
    assert launch("dvae", str(calm), "--nproc", "2").returncode == 0
    assert losses(run) == losses(calm) and losses(run)[-1][0] == 40


def test_configuration_and_data_errors_are_not_requeued(tmp_path: Path) -> None:
    env = stand_in.install(tmp_path / "slurm") | {"LAUNCHER_VENV": venv(tmp_path / "venv")}

    def once(restart: int, *words: str) -> subprocess.CompletedProcess[str]:
        facts = stand_in.batch_environment(tmp_path / "slurm", restart=restart)
        script = ["bash", str(ROOT / "infra/slurm/tokenizer.sbatch"), *words]
        return subprocess.run(script, env=os.environ | env | facts, capture_output=True, text=True, timeout=PATIENCE_S)

    wrong = once(0, "tiny", f"run.root={tmp_path}", "tokenizer.vocba=1")
    assert wrong.returncode == 78 and not requeues(tmp_path / "slurm"), wrong.stdout
    early = once(0, "tiny", f"run.root={tmp_path}")
    assert early.returncode == 65 and not requeues(tmp_path / "slurm"), early.stdout + early.stderr
