"""The doctor: each floor can be missed, and then says what to do and which node to leave out. About 25 s."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import local, storage
from infra.errors import ConfigError, DataError
from infra.job import Job
from infra.local import Finding
from infra.run_folder import RunFolder
from train.verbs import doctor

ROOT = Path(__file__).parent.parent


def test_doctor_passes_on_a_machine_that_is_fit(tmp_path: Path) -> None:
    small = [finding.check for finding in local.memory_and_disk() if not finding.ok]
    if small:
        pytest.skip(f"this machine misses the doctor's floors: {', '.join(small)}")
    command = [sys.executable, str(ROOT / "launcher.py"), "doctor", "tiny", f"run.root={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("shm", "disk", "all-reduce", "storage", "clock", "apex"):
        assert name in done.stdout, name


@pytest.mark.parametrize(
    ("free", "check", "advice"), [((1 << 20, 1 << 40), "shm", "raise cluster.shm_gib"), ((1 << 40, 1 << 20), "disk", "or set TMPDIR")]
)
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, free: tuple[int, int], check: str, advice: str) -> None:
    sizes = iter(free)
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(sizes)))
    (bad,) = [f for f in local.memory_and_disk() if not f.ok]
    assert bad.check == check and bad.found == "0.0 GiB" and advice in bad.advice


def test_storage_is_written_read_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(f.ok for f in local.run_storage(str(tmp_path))) and not list(tmp_path.iterdir())
    monkeypatch.setattr(storage, "modified", lambda url: time.time() - 600)
    skewed = {f.check: f for f in local.run_storage(str(tmp_path))}["clock"]
    assert not skewed.ok and "600 s apart" in skewed.found and "chronyc" in skewed.advice
    monkeypatch.setattr(storage, "read_bytes", lambda url: b"other")
    assert "read other bytes" in local.run_storage(str(tmp_path))[0].found
    monkeypatch.setattr(local, "LATENCY_FLOOR_S", -1.0)
    assert not local.run_storage(str(tmp_path))[0].ok
    (tmp_path / "file").touch()
    (failed,) = local.run_storage(str(tmp_path / "file"))
    assert not failed.ok and "credentials" in failed.advice


def test_storage_on_s3_tells_its_clock(s3: str) -> None:
    assert all(f.ok for f in local.run_storage(s3))
    with pytest.raises(DataError, match="does not exist"):
        storage.modified(f"{s3}/nothing")


SMI = '#!/bin/sh\nprintf "%s"\nexit %d\n'


@pytest.mark.parametrize(
    ("answer", "code", "expected", "bad"),
    [
        ("0, 40, 0\\n1, 41, 0\\n", 0, 2, set()),
        ("0, 40, 0\\n", 0, 2, {"gpus"}),
        ("0, 40, 3\\n1, 41, 0\\n", 0, 2, {"ecc"}),
        ("0, 91, [N/A]\\n", 0, 1, {"temperature"}),
        ("", 9, 1, {"gpus"}),
    ],
)
def test_gpus_are_counted_and_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, expected: int, bad: set[str]
) -> None:
    (tmp_path / "nvidia-smi").write_text(SMI % (answer, code))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = local.gpus({"SLURM_GPUS_ON_NODE": str(expected)})
    assert {f.check for f in found if not f.ok} == bad
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert local.gpus({}) == [] and not local.gpus({"SLURM_GPUS_ON_NODE": "8"})[0].ok


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SLURM_JOB_ID": "7"}, "--exclude=gpu07"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubectl cordon gpu07"),
        ({}, "gpu07: mend it"),
    ],
)
def test_an_unfit_node_is_named_with_how_to_leave_it_out(env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words in local.exclusion("gpu07", env)
    assert local.node_name({"SLURMD_NODENAME": "a", "NODE_NAME": "b"}) == "a" and local.node_name({"NODE_NAME": "b"}) == "b"
    assert local.node_name({}) == os.uname().nodename


def test_a_missed_floor_ends_a_job_before_its_rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine", lambda: [Finding("ecc", False, "uncorrected errors on 3", "none", "replace it")])
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    with pytest.raises(doctor.UnfitNode, match=r"node gpu07 is unfit:\n  ecc: uncorrected errors on 3 \(floor: none\); replace it") as caught:
        doctor.preflight(RunFolder(str(tmp_path)))
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("program", "ok", "words"),
    [
        ('print(\'{"backend": "gloo", "ranks": 2, "gb_per_s": 3.0}\')', True, "3.00 GB/s (gloo, 2 ranks)"),
        ('print(\'{"backend": "nccl", "ranks": 8, "gb_per_s": 3.0}\')', False, "3.00 GB/s (nccl, 8 ranks)"),
        ("raise SystemExit('NCCL error')", False, "NCCL error"),
        ("import time; time.sleep(60)", False, "no end within"),
    ],
)
def test_an_all_reduce_is_held_against_its_floor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, ok: bool, words: str) -> None:
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -c "$PROGRAM"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PROGRAM", program)
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(doctor, "_ALL_REDUCE_S", 3)
    found = doctor.all_reduce()
    assert found.ok == ok and words in found.found


def test_nodes_must_have_equal_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(str(tmp_path))
    first, second = Job("7", 0, 0, 2, "a:1"), Job("7", 0, 1, 2, "a:1")
    monkeypatch.setattr(doctor, "_NODES_S", 1)
    assert "did not report" in doctor.same_versions(run, second).found
    threading.Timer(0.3, doctor.same_versions, args=(run, first)).start()
    monkeypatch.setattr(doctor, "_NODES_S", 20)
    assert doctor.same_versions(run, second).ok
    monkeypatch.setattr(doctor, "producer", lambda: {"commit": "other"})
    odd = doctor.same_versions(run, second)
    assert not odd.ok and "other than on" in odd.found


def test_inputs_of_another_lineage_are_named(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert doctor.lineage(run) == []
    storage.write_json(run.at("images", "train", "manifest.json"), {"content_hash": "aa"})
    run.finish("dvae", parents={"images": "aa"})
    assert doctor.lineage(run)[0].ok
    run.finish("clip", parents={"images": "bb"})
    assert doctor.lineage(run)[0].found == "made from other images: clip"


def test_apex_is_told_from_its_namesake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "absent (optional" in local.apex().found
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert "another project" in local.apex().found
    (tmp_path / "apex" / "optimizers").mkdir()
    assert "without its CUDA extensions" in local.apex().found
    (tmp_path / "amp_C.py").touch()
    assert "with CUDA extensions" in local.apex().found
    assert re.fullmatch("apex FusedAdam: it cannot be imported .*; apex FusedLayerNorm: it cannot be imported .*", doctor.apex().found)


def test_a_planted_secret_is_written_nowhere(tmp_path: Path) -> None:
    """What stages and the doctor write and print holds no credential, whatever the environment has."""
    secret = "xyzzy-0123456789"
    names = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY", "LAUNCHER_TOKEN")
    environment = os.environ | dict.fromkeys(names, secret) | {"AWS_ACCESS_KEY_ID": "xyzzy-key"}
    said = ""
    for stage in ("prepare",):
        command = [sys.executable, str(ROOT / "launcher.py"), stage, "tiny", f"run.root={tmp_path}", "--nproc", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    words = ["dalle", "tiny", f"run.root={tmp_path}", "--on", "slurm", "--dry-run"]
    said += subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words], capture_output=True, text=True, env=environment, check=True).stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and "xyzzy" not in said
    assert [path for path in files if b"xyzzy" in path.read_bytes()] == []
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())
    with pytest.raises(ConfigError, match="unknown key"):
        from train.config import load_run

        load_run("tiny", ["run.secret=x"])
