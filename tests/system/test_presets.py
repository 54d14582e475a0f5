"""Presets are whole recipes: each is planned on, and submitted to, the machines that its [cluster] names. About 15 s."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import launcher
from infra.errors import ExitCode
from infra.signals import StopFlag
from train import launch
from train.config import PRESETS, load_run, read_preset

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))
LARGE = [name for name in NAMES if name not in ("tiny", "demo")]
SITE = ["cluster.image=registry.example/team/launcher@sha256:" + "0a" * 32, "run.root=s3://bucket/runs"]
"""What a preset cannot know: the registry and the bucket of a site."""


def shown_by_dry_run(name: str, overrides: list[str], on: str, capsys: pytest.CaptureFixture[str]) -> str:
    launch.stage("dalle", name, overrides, on=on, nproc=0, dry_run=True, worker=False, stop=StopFlag())
    return capsys.readouterr().out


@pytest.mark.parametrize("name", LARGE)
def test_a_preset_states_its_whole_recipe(name: str) -> None:
    tree = read_preset(name)[0]
    stated = {f"{section}.{key}" for section, values in tree.items() for key in values}
    assert {"dalle_fit.steps", "dalle_fit.precision", "cluster.gpus"} <= stated
    cfg = load_run(name, [])
    # The paper's five halvings, or a cosine to the same end.
    halves = cfg.dalle_fit.schedule == "plateau" and 0.5**cfg.dalle_fit.halvings == 1 / 32
    assert halves or cfg.dalle_fit.lr_final == pytest.approx(cfg.dalle_fit.lr / 32)
    processes = cfg.cluster.nodes * cfg.cluster.gpus
    assert cfg.cluster.overlay == "gpu" and cfg.dalle_fit.batch % (processes * cfg.dalle_fit.accumulation) == 0
    head = (PRESETS / f"{name}.toml").read_text().split("\n\n")[0]
    for words in (f"launcher.py plan {name} ", f"launcher.py dalle {name} --on slurm --dry-run"):
        assert words in head


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_planned_on_its_own_machines(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["plan", name]) == ExitCode.DONE
    shown, cluster = capsys.readouterr().out, load_run(name, []).cluster
    assert f" = {cluster.nodes} nodes x {cluster.gpus or 1} GPUs x " in shown
    for word in ("parameters ", "operations ", "B on each GPU", "* ZeRO", "time of an update", "the whole run", "MWh", "assumed "):
        assert word in shown


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_shows_its_job_for_slurm(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown, cluster = shown_by_dry_run(name, [f"run.root={tmp_path}"], "slurm", capsys), load_run(name, []).cluster
    command = next(line for line in shown.splitlines() if "sbatch --parsable" in line).split()
    asked = {f"--nodes={cluster.nodes}", f"--cpus-per-task={cluster.cpus}", f"--mem={cluster.memory_gib}G"}
    assert asked <= set(command)
    assert [word for word in command if word.startswith("--gpus-per-node")] == ([f"--gpus-per-node={cluster.gpus}"] if cluster.gpus else [])
    assert "run_stage dalle" in shown and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_shows_its_job_for_kubernetes(name: str, kubectl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")
    shown, cluster = shown_by_dry_run(name, SITE, "k8s", capsys), load_run(name, []).cluster
    overlay = json.loads(shown.split("# overlay\n")[1].split("\n# kubectl")[0])
    steps = {step["path"]: step.get("value") for step in json.loads(overlay["patches"][0]["patch"])}
    asked = json.loads(steps["/metadata/annotations/text-to-image~1asked"])
    assert overlay["resources"] == ["base"] and asked["cluster.overlay"] == cluster.overlay, "the overlay is copied whole, as the base of this job"
    assert steps["/spec/replicatedJobs/0/template/spec/completions"] == cluster.nodes
    limits = "/spec/replicatedJobs/0/template/spec/template/spec/containers/0/resources/limits"
    assert steps[f"{limits}/nvidia.com~1gpu"] == (str(cluster.gpus) if cluster.gpus else None), "replaced, or removed"
    assert "kind: JobSet" in shown
