"""What is not there is found when a job is submitted, and before its configuration becomes the run's. A few seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import storage
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from train.config import RunConfig, load_run
from train.run import cluster, places, submitted_inputs


def configured(folder: Path | str, *words: str) -> RunConfig:
    return load_run("tiny", [f"run.root={folder}", f"cluster.image=registry/name@sha256:{'a' * 64}", *words])


@pytest.mark.parametrize("stage", ["prepare", "report"])
def test_a_source_that_is_not_there_is_refused_and_no_run_is_made_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # neither sbatch nor anything else is asked
    for words, message in (
        (f"data.sources={tmp_path}/nowhere", r"/nowhere: no such folder or file, or it is empty; data\.sources accepts 'emoji'"),
        (
            f'data.sources=[{{url="{tmp_path}/none/*.tar", kind="webdataset"}}]',
            r"none/\*\.tar: no such folder or file, or it is empty; correct",
        ),
        (f"data.takedown={tmp_path}/list.txt", r"data\.takedown = .*list\.txt: does not exist; name a text file"),
    ):
        cfg = configured(tmp_path, words)
        with pytest.raises(DataError, match=message):
            cluster.submit(stage, cfg, places.run_folder(cfg), "slurm", chain=stage == "report", command="")
    assert not (tmp_path / "tiny").exists()


def test_sources_are_looked_at_on_s3_and_by_their_names_alone(s3: str, tmp_path: Path) -> None:
    cfg = configured(tmp_path, f"data.sources={s3}/raw")
    with pytest.raises(DataError, match=r"raw: no such folder or file, or it is empty"):
        submitted_inputs.check(cfg, "k8s", prepares=True)
    storage.write_bytes(f"{s3}/raw/0001.tar", b"not a tar")
    assert submitted_inputs.check(cfg, "k8s", prepares=True) == []
    assert submitted_inputs.check(configured(tmp_path, f"data.sources={tmp_path}/none"), "slurm", prepares=False) == [], "it is prepared"


def test_a_path_is_not_refused_where_only_pods_can_see_it(tmp_path: Path) -> None:
    lines = submitted_inputs.check(configured(tmp_path, f"data.sources={tmp_path}/raw"), "k8s", prepares=True)
    assert lines == [
        f"data.sources = {tmp_path}/raw is a path: pods see it only where the image or the site's folder brings it; it was not looked at"
    ]


def test_a_stage_whose_inputs_are_not_there_is_not_submitted_to_kubernetes_which_knows_no_order(s3: str) -> None:
    cfg = configured(s3)
    run = RunFolder(f"{s3}/tiny")
    with pytest.raises(DataError, match=r"dalle needs what 'tokenizer' makes, .* run 'launcher\.py tokenizer \S+ --on k8s' first, and submit this"):
        cluster.submit("dalle", cfg, run, "k8s", chain=False, command="")
    for stage in ("tokenizer", "encode"):
        storage.write_bytes(run.at(stage, "done.json"), b"{}")
    submitted_inputs.require("dalle", cfg, run)


@pytest.mark.parametrize("refusal", ["inputs", "scheduler", "second job"])
def test_a_refused_submission_leaves_no_run_that_another_value_would_contradict(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partition that does not exist left a configuration, and the corrected command was refused as another run."""
    script = f'[ -e {tmp_path}/once ] && {{ echo 7; exit 0; }}; echo "invalid partition" >&2; exit 1'
    if refusal == "second job":
        script = f"[ -e {tmp_path}/once ] && exit 1; touch {tmp_path}/once; echo 7"
    for name, text in (("squeue", "exit 0"), ("sbatch", script)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    root = tmp_path / "runs"
    cfg = configured(root)
    with pytest.raises((DataError, ConfigError), match=r"needs what 'prepare' makes" if refusal == "inputs" else r"sbatch .* ended with 1"):
        cluster.submit("dvae" if refusal == "inputs" else "report", cfg, places.run_folder(cfg), "slurm", chain=refusal != "inputs", command="")
    if refusal == "second job":
        assert (root / "tiny" / "config.json").exists() and (root / "tiny" / "jobs" / "prepare.json").exists(), "the first one is on its way"
        return
    assert not (root / "tiny").exists()
    (tmp_path / "once").touch()
    other = configured(root, "dvae_fit.steps=7")
    cluster.submit("prepare", other, places.run_folder(other), "slurm", chain=False, command="")
    assert (root / "tiny" / "jobs" / "prepare.json").exists()


def test_what_a_refused_submission_to_s3_created_is_taken_back(s3: str) -> None:
    cfg, run = configured(s3), RunFolder(f"{s3}/tiny")
    with pytest.raises(DataError, match="dalle needs what 'tokenizer' makes"):
        cluster.submit("dalle", cfg, run, "k8s", chain=False, command="")
    assert storage.list_files(run.url) == []
