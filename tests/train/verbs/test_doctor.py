"""The doctor: each floor can be missed, and then says what to do and which node to leave out. About 25 s."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import meeting, node_checks, storage
from infra.errors import DataError
from infra.job import Job
from infra.node_checks import Finding
from infra.run_folder import RunFolder
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.config import load_run
from train.verbs import doctor


def test_doctor_passes_on_a_machine_that_is_fit(tmp_path: Path) -> None:
    small = [finding.check for finding in node_checks.memory_and_disk() if not finding.ok]
    if small:
        pytest.skip(f"this machine misses the doctor's floors: {', '.join(small)}")
    command = [sys.executable, str(ROOT / "launcher.py"), "doctor", "tiny", f"run.root={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if re.search(r"no end within|no answer within|^all-reduce +FAILED +\d", done.stdout, re.MULTILINE):  # a number: it ran, but slowly
        pytest.skip("this machine is too busy for the doctor's limits")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("shm", "disk", "all-reduce", "storage", "clock", "packages", "apex"):
        assert name in done.stdout, name


@pytest.mark.parametrize(
    ("free", "check", "advice"), [((1 << 20, 1 << 40), "shm", "raise cluster.shm_gib"), ((1 << 40, 1 << 20), "disk", "or set TMPDIR")]
)
def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, free: tuple[int, int], check: str, advice: str) -> None:
    sizes = iter(free)
    monkeypatch.setattr(node_checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(sizes)))
    (bad,) = [f for f in node_checks.memory_and_disk() if not f.ok]
    assert bad.check == check and bad.found == "0.0 GiB" and advice in bad.advice


def test_packages_that_are_missing_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = node_checks.packages()
    assert whole.ok and re.fullmatch(r"all \d\d of requirements\.txt", whole.found)
    there = node_checks.importlib.metadata.distribution

    def distribution(name: str) -> object:
        if name in ("deepspeed", "resvg-py"):
            raise node_checks.importlib.metadata.PackageNotFoundError(name)
        return there(name)

    monkeypatch.setattr(node_checks.importlib.metadata, "distribution", distribution)
    lacking = node_checks.packages()
    assert (
        not lacking.ok
        and lacking.found == "deepspeed, resvg-py missing"
        and lacking.advice.endswith("-m pip install -r requirements.txt -c constraints.txt")
    )


def test_storage_is_written_read_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "LATENCY_FLOOR_S", 60.0)
    assert all(f.ok for f in node_checks.run_storage(str(tmp_path))) and not list(tmp_path.iterdir())
    monkeypatch.setattr(storage, "modified", lambda url: time.time() - 600)
    skewed = {f.check: f for f in node_checks.run_storage(str(tmp_path))}["clock"]
    assert not skewed.ok and "600 s apart" in skewed.found and "chronyc" in skewed.advice
    monkeypatch.setattr(storage, "read_bytes", lambda url: b"other")
    assert "read other bytes" in node_checks.run_storage(str(tmp_path))[0].found
    monkeypatch.undo()
    plain, tries = storage.write_bytes, list[str]()

    def stalls_once(url: str, data: bytes) -> None:
        tries.append(url)
        time.sleep(3.5 if len(tries) == 1 else 0.0)
        plain(url, data)

    monkeypatch.setattr(storage, "write_bytes", stalls_once)
    monkeypatch.setattr(node_checks, "LATENCY_FLOOR_S", 3.0)
    assert node_checks.run_storage(str(tmp_path))[0].ok and len(tries) == 2, "an fsync may stall once"
    monkeypatch.setattr(node_checks, "LATENCY_FLOOR_S", -1.0)
    assert not node_checks.run_storage(str(tmp_path))[0].ok
    (tmp_path / "file").touch()
    (failed,) = node_checks.run_storage(str(tmp_path / "file"))
    assert not failed.ok and "credentials" in failed.advice


def test_storage_on_s3_tells_its_clock(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_checks, "LATENCY_FLOOR_S", 60.0)
    assert all(f.ok for f in node_checks.run_storage(s3))
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
    found = node_checks.gpus({"SLURM_GPUS_ON_NODE": str(expected)})
    assert {f.check for f in found if not f.ok} == bad
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert node_checks.gpus({}) == [] and not node_checks.gpus({"SLURM_GPUS_ON_NODE": "8"})[0].ok


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"SLURM_JOB_ID": "7"}, "--exclude=gpu07"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubectl cordon gpu07"),
        ({}, "gpu07: mend it"),
    ],
)
def test_an_unfit_node_is_named_with_how_to_leave_it_out(env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert words in node_checks.exclusion("gpu07", env)
    assert node_checks.node_name({"SLURMD_NODENAME": "a", "NODE_NAME": "b"}) == "a" and node_checks.node_name({"NODE_NAME": "b"}) == "b"
    assert node_checks.node_name({}) == os.uname().nodename


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


@pytest.mark.parametrize(
    ("tool", "advice"), [("/usr/bin/nvidia-smi", "check NVLink, and run nccl-tests"), (None, "see what else works on this machine")]
)
def test_an_all_reduce_without_an_end_is_blamed_on_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, tool: str | None, advice: str) -> None:
    """A busy machine without a GPU was told to look at its NVLink."""
    monkeypatch.setattr(doctor, "_ALL_REDUCE_S", 0.01)
    monkeypatch.setattr(doctor, "shutil", SimpleNamespace(which=lambda name: tool))
    assert advice in doctor.all_reduce().advice


def report(run: RunFolder, node: int, commit: str, monkeypatch: pytest.MonkeyPatch) -> Finding:
    """What a node of four finds, and leaves for the others."""
    monkeypatch.setattr(doctor, "producer", lambda: {"commit": commit, "versions": {"torch": "2.15.0"}})
    monkeypatch.setenv("NODE_NAME", f"gpu{node:02d}")
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    return doctor.same_versions(run, Job("7", 0, node, 4, "a:1"))


def test_nodes_must_have_equal_versions_and_the_odd_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(str(tmp_path))
    assert report(run, 1, "new", monkeypatch).ok, "nobody waits for node 0"
    assert "on 2 of 4 nodes so far" in report(run, 2, "new", monkeypatch).found
    odd = report(run, 0, "old", monkeypatch)
    assert not odd.ok and odd.found == "other than on most nodes: gpu00: commit: 'new' -> 'old'" and odd.nodes == ("gpu00",)
    late = report(run, 3, "new", monkeypatch)
    assert not late.ok and late.nodes == ("gpu00",), "who comes last sees all, and blames the odd one, not itself"
    monkeypatch.setattr(doctor, "machine", lambda: [])
    monkeypatch.setattr(doctor.Job, "from_env", lambda: Job("7", 0, 3, 4, "a:1"))
    with pytest.raises(
        doctor.UnfitNode, match=r"node gpu00 is unfit:\n  versions: other than on most nodes.*\n  to go on without it: gpu00: mend it"
    ):
        doctor.preflight(run)
    again = RunFolder(str(tmp_path / "again"))
    report(again, 0, "a", monkeypatch)
    assert report(again, 1, "b", monkeypatch).nodes == ("gpu01",), "of two, the second"


def test_a_resumed_job_of_the_same_id_may_have_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspend and resume keep a JobSet's uid and restart count: the versions of the start before lie in the same folder, unless it took them back."""
    run, folder = RunFolder(str(tmp_path)), tmp_path / "preflight" / "7.0"
    monkeypatch.setattr(doctor, "machine", lambda: [])
    monkeypatch.setattr(doctor, "producer", lambda: {"commit": "old", "versions": {}})
    for node in range(4):
        job = Job("7", 0, node, 4, "a:1")
        monkeypatch.setattr(doctor.Job, "from_env", lambda job=job: job)
        with doctor.fit(run, job):
            assert len(list(folder.glob("*/*.json"))) == 1, "and those before it have gone"
    assert not list(folder.glob("*/*.json"))
    for node in range(4):  # nodes that were killed took nothing back
        report(run, node, "old", monkeypatch)
    assert not report(run, 0, "new", monkeypatch).ok, "they may still be coming"
    for left in folder.glob("*/*.json"):
        os.utime(left, (1.0, left.stat().st_mtime - meeting.RENDEZVOUS_S - doctor.LIMIT_S - 1))
    for node in range(4):
        found = report(run, node, "new", monkeypatch)
        assert found.ok and f"on {node + 1} of 4 nodes so far" in found.found, "as long after, they are of another start"
    assert report(run, 1, "old", monkeypatch).nodes == ("gpu01",), "and one that is odd now is still seen"


def test_a_check_that_hangs_is_a_finding_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIMIT_S", 3.0)
    started = time.monotonic()

    def hung() -> list[Finding]:
        time.sleep(60)
        return []

    found = doctor.gathered({"storage": hung, "other": lambda: [Finding("other", True, "well")]})
    assert time.monotonic() - started < 30
    assert [(f.check, f.ok) for f in found] == [("storage", False), ("other", True)]
    assert found[0].found == "no answer within 3.0 s" and "check the network and S3_ENDPOINT_URL" in found[0].advice
    assert doctor.LIMIT_S < 30
    with pytest.raises(DataError, match="as it is"):
        doctor.gathered({"lineage": lambda: (_ for _ in ()).throw(DataError("as it is"))})


def lineage_of(run: RunFolder) -> Finding | None:
    found = doctor.lineage(load_run("tiny", [f"run.root={Path(run.url).parent}", f"run.name={Path(run.url).name}"]), run)
    return found[0] if found else None


def test_the_limit_of_all_checks_is_half_a_minute() -> None:
    assert doctor.LIMIT_S <= 30 and doctor._ALL_REDUCE_S < doctor.LIMIT_S


_IMAGES, _CODES = {"train": "a1", "validation": "b1"}, {"train": "a2", "validation": "b2"}
_EXPORTS = {"dvae": "d1", "dalle": "d2", "clip": "c1"}
"""Beginnings of content hashes."""


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """The markers of a whole run."""
    run = RunFolder(str(tmp_path / "tiny"))
    for split in ("train", "validation"):
        storage.write_json(run.at("images", split, "versions", _IMAGES[split].ljust(16, "0"), "manifest.json"), {"content_hash": "a", "parents": {}})
        image = _IMAGES[split].ljust(64, "0")
        storage.write_json(
            run.at("codes", "crop-0", split, "versions", _CODES[split].ljust(16, "0"), "manifest.json"),
            {"content_hash": "a", "parents": {"images": image}},
        )
    run.finish("prepare", versions={"train": "a1".ljust(64, "0"), "validation": "b1".ljust(64, "0")})
    for name in ("dvae", "dalle", "clip"):
        storage.write_json(run.at(name, "export", "config.json"), {"content_hash": _EXPORTS[name].ljust(64, "0")})
    storage.write_json(run.at("tokenizer", "manifest.json"), {"content_hash": "b9".ljust(64, "0")})
    exports = {name: _EXPORTS[name].ljust(64, "0") for name in _EXPORTS} | {"tokenizer": "b9".ljust(64, "0")}
    run.finish("tokenizer", parents={"images": "a1".ljust(64, "0")})
    run.finish("dvae", parents={"images": "a1".ljust(64, "0")})
    run.finish("encode", parents={"dvae": exports["dvae"]}, versions={"0/train": "a2".ljust(64, "0"), "0/validation": "b2".ljust(64, "0")})
    codes, elsewhere = "a2".ljust(64, "0"), "of another run".ljust(64, "0")
    run.finish("dalle", parents={"codes": codes, "dvae": exports["dvae"], "tokenizer": exports["tokenizer"], "init_from": elsewhere})
    run.finish("clip", parents={"images": "a1".ljust(64, "0"), "tokenizer": exports["tokenizer"]})
    run.finish("generate", parents=exports)
    run.finish("evaluate", parents=exports | {"images": "b1".ljust(64, "0"), "codes": "b2".ljust(64, "0")})
    return run


def test_the_lineage_of_a_whole_run_is_looked_at(finished: RunFolder, tmp_path: Path) -> None:
    assert lineage_of(RunFolder(str(tmp_path / "empty"))) is None
    found = lineage_of(finished)
    assert found is not None and found.ok and found.found == "18 parents of finished stages are there"


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        *(("tokenizer", "images"), ("dvae", "images"), ("encode", "dvae"), ("dalle", "codes"), ("dalle", "dvae"), ("dalle", "tokenizer")),
        *(("clip", "images"), ("clip", "tokenizer"), ("generate", "dalle"), ("generate", "clip"), ("evaluate", "codes"), ("evaluate", "images")),
    ],
)
def test_inputs_of_another_lineage_are_named_for_every_stage(finished: RunFolder, stage: str, kind: str) -> None:
    marker = finished.done(stage) or {}
    storage.write_json(finished.at(stage, "done.json"), marker | {"parents": marker["parents"] | {kind: "f" * 64}})
    found = lineage_of(finished)
    assert found is not None and not found.ok and f"{stage} was made from {kind} ffffffffffff, the run has" in found.found


def test_versions_that_are_gone_and_codes_of_other_images_are_named(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.delete_prefix(finished.at("images", "validation", "versions"))
    storage.delete_prefix(finished.at("codes", "crop-0", "validation", "versions"))
    place = finished.at("codes", "crop-0", "train", "versions", "a2".ljust(16, "0"), "manifest.json")
    storage.write_json(place, {"content_hash": "a", "parents": {"images": "e" * 64}})
    found = lineage_of(finished)
    assert found is not None and not found.ok
    for words in ("images/validation has no version b100", "crop-0/validation has no version b200", "train was made from images eeeeeeeeeeee"):
        assert words in found.found, words
    monkeypatch.setattr(doctor, "machine", lambda: [])
    monkeypatch.setattr(doctor, "all_reduce", lambda: Finding("all-reduce", True, "fast"))
    with pytest.raises(DataError, match=r"inputs of .*tiny do not belong together: .*; put the old inputs back, or delete these stages' folders"):
        doctor.main("tiny", [f"run.root={Path(finished.url).parent}"])


def test_a_long_list_of_faults_is_cut(finished: RunFolder) -> None:
    for stage in ("tokenizer", "dvae", "encode", "dalle", "clip", "evaluate"):
        finished.finish(stage, parents={"images": "f" * 64, "tokenizer": "e" * 64})
    found = lineage_of(finished)
    assert found is not None and found.found.count("was made from") + found.found.count("has no version") <= 5 and "more" in found.found


def test_apex_is_told_from_its_namesake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "absent (optional" in node_checks.apex().found
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    assert "another project" in node_checks.apex().found
    (tmp_path / "apex" / "optimizers").mkdir()
    assert "without its CUDA extensions" in node_checks.apex().found
    (tmp_path / "amp_C.py").touch()
    assert "with CUDA extensions" in node_checks.apex().found
    assert re.fullmatch("apex FusedAdam: it cannot be imported .*; apex FusedLayerNorm: it cannot be imported .*", doctor.apex().found)
