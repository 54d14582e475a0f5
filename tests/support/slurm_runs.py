"""Runs as jobs of the real SLURM of tests/infra/test_slurm_real.py: their folders, attempts and output."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.slurm_cluster import Cluster
from train.loop.metrics import read_metrics

Record = Callable[[str, object], None]


def copy(run: Path, folder: Path) -> Path:
    """A run folder of its own with the same contents."""
    target = folder / "tiny"
    shutil.copytree(run, target)
    config = json.loads((target / "config.json").read_text())
    config["run"]["root"] = str(folder)
    (target / "config.json").write_text(json.dumps(config))
    return target


def output(run: Path) -> tuple[str, ...]:
    return (f"--output={run}/%x-%j.out",)


def log_of(run: Path, stage: str, job: str) -> str:
    return (run / f"{stage}-{job}.out").read_text()


def codes(run: Path, stage: str = "dvae") -> dict[int, int]:
    """Codes of the attempts whose ends a job script wrote down, by number."""
    return {int(p.parent.name.split("-")[1]): json.loads(p.read_text())["code"] for p in (run / "exits" / stage).glob("attempt-*/end.json")}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read_metrics(str(run), "dvae")["train/loss"]]


def training(slurm: Cluster, run: Path, attempt: int) -> None:
    metrics = run / "dvae" / "metrics" / f"attempt-{attempt}.jsonl"
    slurm.wait(f"attempt {attempt} to train", lambda: metrics.exists() and "train/loss" in metrics.read_text())


def restarted(slurm: Cluster, job: str, times: int) -> None:
    slurm.wait(f"restart {times} of job {job}", lambda: int(slurm.job(job)["Restarts"]) >= times)


def row(record_property: Record, what: str, outcome: str, since: float) -> None:
    """A line of docs/slurm_faults.md."""
    record_property(what, [outcome, round(time.monotonic() - since)])


def reads(path: Path, mark: bytes) -> bool:
    """Whether a NUL-separated file of /proc holds a value; a process that is gone does not."""
    try:
        return mark in path.read_bytes().split(b"\0")
    except OSError:
        return False
