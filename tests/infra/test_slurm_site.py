"""A site's own settings for SLURM: its file, wherever it lies, its options, what its jobs get to see, and the refusals of a job script. A few seconds."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from infra import cloud, queues, s3_client, slurm_site, slurm_submit, storage
from infra.errors import ConfigError
from infra.job import ClusterConfig, JobSpec, Shape
from infra.run_folder import RunFolder
from tests.support import slurm_stand_in as stand_in
from tests.support.root import ROOT


def spec(stage: str = "dalle", shape: Shape = "gang", gpus: int = 8) -> JobSpec:
    return JobSpec(stage, "tiny", "/runs/tiny", shape, ClusterConfig(gpus=gpus), "none" if stage == "prepare" else "node")


def site(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site's file outside the repository."""
    (folder / "mine.env").write_text((ROOT / "infra/slurm/site.env").read_text() + text)
    monkeypatch.setenv("LAUNCHER_SITE", str(folder / "mine.env"))
    return folder / "mine.env"


def test_a_site_gives_sbatch_further_options_by_whether_a_job_has_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch reads no variable for --exclude, and a partition of GPUs refuses who asks for none."""
    text = 'echo "modules loaded"\nLAUNCHER_SBATCH="--exclude=n4,n5 --comment=\'two words\'"\nLAUNCHER_SBATCH_GPU=--partition=gpu\nLAUNCHER_SBATCH_CPU=--partition=cpu\n'
    site(tmp_path, text, monkeypatch)
    training, reading = slurm_submit.sbatch(spec()), slurm_submit.sbatch(spec("prepare", "array"))
    assert training[-5:-2] == ["--exclude=n4,n5", "--comment=two words", "--partition=gpu"] and training[-2].endswith("/dalle.sbatch")
    assert reading[-5:-2] == ["--exclude=n4,n5", "--comment=two words", "--partition=cpu"]
    assert "--partition=cpu" in slurm_submit.sbatch(spec(gpus=0)), "who trains on CPUs asks for none"
    assert "'--comment=two words'" in slurm_submit.shown(spec()), "the dry run shows them, to be pasted"
    monkeypatch.delenv("LAUNCHER_SITE")
    assert not [word for word in slurm_submit.sbatch(spec()) if word.startswith(("--exclude", "--partition"))], "the repository's file names none"


def test_options_that_no_shell_would_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_SBATCH", "--comment='one")
    with pytest.raises(ConfigError, match=r"LAUNCHER_SBATCH = --comment='one: No closing quotation; accepted are options of sbatch, as in a shell"):
        slurm_submit.sbatch(spec())


def test_one_file_is_read_by_submissions_questions_and_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Job scripts read LAUNCHER_SITE, and the submission read the repository's file all the same."""
    file = site(tmp_path, "SBATCH_PARTITION=far\nSLURM_CONF=/far/slurm.conf\n", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAUNCHER_SITE", "mine.env")
    assert slurm_submit.environment(spec())["LAUNCHER_SITE"] == str(file), "jobs start elsewhere"
    assert f". {file};" in slurm_submit.shown(spec())
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue"):
        (tmp_path / "bin" / name).write_text(
            f'#!/bin/sh\necho "{name} $SBATCH_PARTITION $SLURM_CONF" >> {tmp_path}/seen\n[ {name} = squeue ] || echo 8\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    run = JobSpec("dalle", "tiny", str(tmp_path / "run"), "gang", ClusterConfig())
    assert slurm_submit.submit(run, str(tmp_path / "record.json"))[0] == "8"
    assert queues.state(queues.Submitted("dalle", "slurm", "8", 0.0)) == ""
    seen = (tmp_path / "seen").read_text().splitlines()
    assert set(seen) == {"sbatch far /far/slurm.conf", "squeue far /far/slurm.conf"} and seen[-1].startswith("squeue")
    monkeypatch.setenv("LAUNCHER_SITE", "nowhere.env")
    with pytest.raises(ConfigError, match=r"LAUNCHER_SITE = nowhere\.env: there is no such file; name a copy of infra/slurm/site\.env"):
        slurm_site.path()


def test_every_variable_of_a_storage_reaches_jobs_of_a_site_that_exports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {*s3_client._VARIABLES, *(name for names in cloud._VARIABLES.values() for name in names)}
    for name in known:
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    (option,) = slurm_submit._exports()
    assert known - set(option.removeprefix("--export=").split(",")) == set()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"LAUNCHER_VENV": "/nowhere"}, "LAUNCHER_VENV=/nowhere: no environment with a bin/python in "),
        ({"LAUNCHER_RUNTIME": "apptainer"}, "LAUNCHER_RUNTIME=apptainer needs LAUNCHER_IMAGE: a .sif file"),
        ({"LAUNCHER_RUNTIME": "pyxis"}, "LAUNCHER_RUNTIME=pyxis needs LAUNCHER_IMAGE: "),
        ({"LAUNCHER_RUNTIME": "conda"}, "LAUNCHER_RUNTIME=conda: accepted are venv, apptainer and pyxis."),
    ],
)
def test_a_job_without_its_python_says_so_and_is_not_retried(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    env = stand_in.install(tmp_path / "slurm") | stand_in.batch_environment(tmp_path / "slurm") | settings
    done = subprocess.run(["bash", str(ROOT / "infra/slurm/dalle.sbatch"), "RUN"], env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 78 and said in done.stderr and done.stderr.rstrip().endswith("(infra/slurm/site.env)"), done.stderr
    assert not stand_in.calls(tmp_path / "slurm", "srun") and not stand_in.calls(tmp_path / "slurm", "scontrol")


def test_a_job_of_the_same_number_in_another_cluster_is_neither_shown_nor_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is moved brings the numbers of its jobs along; there they are somebody else's, or one's own for something else."""
    run = RunFolder(str(tmp_path / "run"))
    facts = {"scheduler": "slurm", "job": "8", "name": "mine-dvae", "submitted": 0.0, "asked": [], "output": ""}
    storage.write_json(run.at("jobs", "dvae.json"), facts)
    there = tmp_path / "name"
    for name in ("squeue", "scancel"):
        script = f'#!/bin/sh\ncase "$*" in *--name=$(cat {there})*) echo "{name}" >> {tmp_path}/met; echo "RUNNING None";; esac\n'
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = queues.of(run, "dvae")
    assert job is not None
    there.write_text("other-dalle")
    assert queues.state(job) == "" and queues.cancel(job) == "" and not (tmp_path / "met").exists()
    there.write_text("mine-dvae")
    assert queues.state(job) == "RUNNING"
    queues.cancel(job)
    assert (tmp_path / "met").read_text().split() == ["squeue", "scancel"]
    (tmp_path / "scancel").write_text("#!/bin/sh\necho 'scancel: error: Kill job error on job id 8: Invalid job id specified' >&2; exit 1\n")
    assert queues.cancel(job) == queues.OVER, "squeue shows a job a while longer"


@pytest.mark.parametrize("restart", [0, 1, 2, 3])
def test_starts_that_follow_each_other_number_their_steps_differently(tmp_path: Path, restart: int) -> None:
    """A start that slept through the loss of its node aborted the step of the next one as it woke: both were step 0 of the job."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    env = (
        stand_in.install(tmp_path / "slurm")
        | stand_in.batch_environment(tmp_path / "slurm", restart=restart)
        | {"LAUNCHER_VENV": str(tmp_path / "venv")}
    )
    done = subprocess.run(["bash", str(ROOT / "infra/slurm/dalle.sbatch"), "RUN"], env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [next(word for word in call if not word.startswith("--")) for call in stand_in.calls(tmp_path / "slurm", "srun")]
    assert steps == ["true", "env"][1 - restart % 2 :], "the launchers' step is number 1 of every second start"
