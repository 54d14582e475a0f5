"""What a run folder of somebody else, a configuration or a name can put into the words of schedulers: nothing but values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra import queues, slurm_submit, storage
from infra.errors import ConfigError, DataError
from infra.job import ClusterConfig, JobSpec
from infra.k8s_submit import overlay
from infra.run_folder import RunFolder

SLURM = {"scheduler": "slurm", "job": "8", "name": "mine-0a1b2c-dvae", "submitted": 0.0, "output": "logs/mine-0a1b2c-dvae-%A_%a.out"}
K8S = {"scheduler": "k8s", "job": "mine-0a1b2c-dvae", "kind": "jobset", "namespace": "team-a", "submitted": 0.0}
IMAGE = f"registry/image@sha256:{'0' * 64}"


@pytest.mark.parametrize(
    "fields",
    [
        *(SLURM | {"job": odd} for odd in ("--user=me", "-u", "8 9", "8,9", "", "8\n", "mine", "8_1-4")),
        *(SLURM | {"name": odd} for odd in ("--me", "a,b", "x y", "x\n")),
        *(SLURM | {"output": odd} for odd in ("/etc/passwd", "../../secret/x-%j.out", ".ssh/id", "logs/../../x-%j.out", "logs/x-%j.out\n", "x")),
        *(K8S | {"job": odd} for odd in ("--all", "-l", "a/b", "a b", "", "A", "x\n")),
        *(K8S | {"kind": odd} for odd in ("namespace", "pods", "--all", "job,pods")),
        *(K8S | {"namespace": odd} for odd in ("--all-namespaces", "a b", "a\n", "kube/system")),
    ],
)
def test_a_record_of_a_job_that_would_say_more_than_its_name_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    storage.write_json(run.at("jobs", "dvae.json"), fields)
    with pytest.raises(DataError, match=r"jobs/dvae\.json: .*(job|name|output|kind|namespace)"):
        queues.of(run, "dvae")


def test_records_that_are_written_are_read(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for fields in (SLURM, K8S, SLURM | {"output": ""}, SLURM | {"output": "/data/%%x/logs/mine-0a1b2c-dvae-%j.out"}, K8S | {"kind": "job"}):
        storage.write_json(run.at("jobs", "dvae.json"), fields)
        job = queues.of(run, "dvae")
        assert job is not None and job.job == fields["job"]


@pytest.mark.parametrize("name", ["$(touch x)", "`id`", "a: {b}", "'; rm -rf ~ #", "\"}'", "x && y", "-rf", "* ? [a]", "%j %x", "ü你"])
def test_a_run_of_any_name_is_one_value_in_scripts_and_manifests(name: str, tmp_path: Path) -> None:
    spec = JobSpec("dvae", name, f"s3://bucket/{name}", "gang", ClusterConfig(image=IMAGE, namespace="team-a"))
    assert spec.name.endswith("-dvae") and set(spec.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and spec.name[0] != "-"
    words = slurm_submit.sbatch(JobSpec("dvae", name, str(tmp_path / name), "gang", ClusterConfig()))
    assert words[-1] == str(tmp_path / name) and words[2] == f"--job-name={JobSpec('dvae', name, words[-1], 'gang', ClusterConfig()).name}"
    found = json.loads(json.dumps(overlay(spec)))
    assert found["configMapGenerator"][0]["literals"][0] == f"LAUNCHER_RUN={spec.run_url}"
    patch = json.loads(found["patches"][0]["patch"])
    asked = next(step["value"] for step in patch if "annotations" in step["path"] and "asked" in step["path"])
    assert json.loads(asked)["run folder"] == spec.run_url


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\0", "\x7f", "\u2028", "\x85"])
def test_a_control_character_in_a_path_reaches_no_scheduler(character: str) -> None:
    with pytest.raises(
        ConfigError, match=r"run folder 's3://b/a\\.*its path holds a control character; --on slurm and --on k8s accept none: rename it"
    ):
        JobSpec("dvae", "a", f"s3://b/a{character}kind: Job", "gang", ClusterConfig())


def test_slurm_gets_no_backslash_in_the_path_of_its_output(tmp_path: Path) -> None:
    spec = JobSpec("dvae", "a", str(tmp_path / "a\\b"), "gang", ClusterConfig())
    with pytest.raises(ConfigError, match=r"a\\b/logs: SLURM accepts no backslash in the path of a job's output: rename the folder"):
        slurm_submit.sbatch(spec)


@pytest.mark.parametrize("image", [f"{IMAGE}\n", "\n", f"{IMAGE} --privileged", f"{IMAGE}\nkind: Pod"])
def test_an_image_is_one_word(image: str) -> None:
    with pytest.raises(ValueError, match="not pinned by its digest"):
        ClusterConfig(image=image)


def test_a_file_of_terabytes_that_takes_no_disk_is_not_read_into_memory(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"x: larger than 8,589,934,592 bytes, and such files are read whole"):
        storage.read_bytes(str(tmp_path / "x"))
