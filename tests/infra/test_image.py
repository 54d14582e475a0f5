"""The image: bases and their lock, CUDA's version in its one place, what is left out, and every step of the build run in a clean root folder (make soak)."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import chroot_image
from tests.support.root import ROOT

DOCKER = ROOT / "infra" / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
DIGEST = "sha256:" + "0a" * 32


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CHECK = script(DOCKER / "check_image.py")
FREEZE = script(ROOT / ".ci" / "freeze.py")


def lock() -> dict[str, tuple[str, str]]:
    lines = [line.split() for line in (DOCKER / "images.lock").read_text().splitlines() if line and not line.startswith("#")]
    return {argument: (image, digest) for argument, image, digest in lines}


def test_cuda_is_that_of_the_locked_torch_in_every_place() -> None:
    recorded = CHECK.recorded_cuda((ROOT / "constraints.txt").read_text())
    arguments, _ = chroot_image.parse(DOCKERFILE)
    assert re.fullmatch(rf"nvidia/cuda:{re.escape(recorded)}\.\d+-devel-ubuntu\d\d\.04", arguments["CUDA_IMAGE"])
    assert f"ARG CUDA={recorded}\n" in DOCKERFILE
    import torch

    CHECK.check_cuda(torch.version.cuda, recorded)


def test_another_cuda_than_the_recorded_one_is_refused_and_a_cpu_build_is_not() -> None:
    CHECK.check_cuda(None, "13.2")
    with pytest.raises(SystemExit, match=r"torch was built with CUDA 12\.8, constraints\.txt records 13\.2: freeze it again"):
        CHECK.check_cuda("12.8", "13.2")
    with pytest.raises(SystemExit, match=r"no line '# torch\.version\.cuda: \.\.\.'; write the file with \.ci/freeze\.py"):
        CHECK.recorded_cuda("torch==2.15.0\n")


def test_freezing_records_cuda_and_leaves_out_what_torch_pins() -> None:
    listed = "torch==2.15.0+cu132\nnvidia-nccl-cu13==2.30.7\ntriton==3.9.0\npip==26.1\ncuda-bindings==13.2.0\nRich==15.0.0\n"
    text = FREEZE.frozen(listed, "13.2")
    assert CHECK.recorded_cuda(text) == "13.2" and text.splitlines()[4:] == ["rich==15.0.0", "torch==2.15.0"]
    assert text.splitlines()[:4] == (ROOT / "constraints.txt").read_text().splitlines()[:4]
    with pytest.raises(SystemExit, match="this torch is a CPU build"):
        FREEZE.frozen(listed, "None")


def test_only_apex_needs_cuda_and_the_base_is_plain() -> None:
    arguments, stages = chroot_image.parse(DOCKERFILE)
    bases = {stage.name: stage.base for stage in stages}
    assert arguments["BASE"].startswith("debian:") and bases["cuda"] == arguments["CUDA_IMAGE"]
    users = [stage.name for stage in stages if any("--from=cuda" in rest for _, rest in stage.steps)]
    assert users == ["environment-apex"] and "system" in {bases["base"], bases["environment"]}
    (archs,) = [rest for stage in stages for word, rest in stage.steps if word == "ARG" and rest.startswith("TORCH_CUDA_ARCH_LIST")]
    assert archs == 'TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0;10.0;12.0+PTX"'
    assert "op_builder" not in DOCKERFILE, "no op that nothing loads"
    (system,) = [stage for stage in stages if stage.name == "system"]
    assert {"gcc", "g++", "python3-dev"} <= set(system.steps[1][1].split()), "what Triton compiles with stays in the image"
    assert all(("RUN", "python infra/docker/check_image.py") in stage.steps for stage in stages if stage.name in ("launcher", "apex"))


def test_the_lock_names_the_bases_of_the_build_and_says_what_nobody_pulled() -> None:
    arguments, _ = chroot_image.parse(DOCKERFILE)
    assert {argument: image for argument, (image, _) in lock().items()} == arguments
    assert all(digest == "not-pulled" or re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for _, digest in lock().values())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copies of the scripts and the lock, beside a docker that records what it is asked and answers with $ANSWER."""
    place = tmp_path / "infra" / "docker"
    place.mkdir(parents=True)
    for name in ("build.sh", "lock.sh", "images.lock"):
        (place / name).write_bytes((DOCKER / name).read_bytes())
    (tmp_path / "docker").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/asked\n[ "$1" = build ] || echo "$ANSWER"\n')
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("LOCKED", raising=False)
    return place


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *words], capture_output=True, text=True, check=False)


def test_digests_come_from_a_registry_into_the_lock_and_from_there_into_the_build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "images.lock").read_text()
    monkeypatch.setenv("ANSWER", DIGEST)
    assert ran(str(folder / "lock.sh")).returncode == 0
    assert (folder / "images.lock").read_text() == before.replace(" not-pulled", f" {DIGEST}").replace(f"# {DIGEST}", "# not-pulled")
    (folder.parents[1] / "asked").unlink()
    done = ran(str(folder / "build.sh"), "apex", "mine:1", "--pull")
    asked = (folder.parents[1] / "asked").read_text().splitlines()
    assert done.returncode == 0 and done.stderr == "" and f"BASE=debian:12-slim@{DIGEST}" in asked and "--pull" in asked
    assert asked[asked.index("--target") + 1] == "apex" and asked[asked.index("-t") + 1] == "mine:1"


def test_no_digest_is_invented(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "images.lock").read_text()
    monkeypatch.setenv("ANSWER", "no such manifest")
    done = ran(str(folder / "lock.sh"))
    assert done.returncode == 1 and "no digest for debian:12-slim; its line stays as it is (not-pulled)" in done.stderr
    assert (folder / "images.lock").read_text() == before
    built = ran(str(folder / "build.sh"), "launcher", "mine")
    assert built.returncode == 0 and "debian:12-slim has no digest in images.lock (not pulled yet)" in built.stderr
    monkeypatch.setenv("LOCKED", "1")
    refused = ran(str(folder / "build.sh"), "launcher", "mine")
    assert refused.returncode == 78 and "'not-pulled' in images.lock is no digest; run infra/docker/lock.sh" in refused.stderr
    assert ran(str(folder / "build.sh"), "nothing").returncode == 64
    (folder.parents[1] / "docker").unlink()
    alone = ran(str(folder / "lock.sh"))
    assert alone.returncode == 78 and "docker is not installed here" in alone.stderr


BLOCKED = """
import importlib.abc, importlib.util, pkgutil, sys
names = set(sys.argv[1].split(","))
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(name == each or name.startswith(each + ".") for each in names):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import model, data_pipeline, infra, train, launcher, streaming, deepspeed, tensorboard.main
for package in (model, data_pipeline, infra, train):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
print("all imported")
"""


def modules_of(names: list[str]) -> set[str]:
    """Modules that packages of these names bring, by their lists of files; namespaces that others share (google, azure) by their second level."""
    from importlib.metadata import files

    found = set()
    for name in names:
        for file in files(name) or []:
            parts = file.parts
            if file.suffix == ".py" and not parts[0].endswith((".dist-info", ".data")) and ".." not in parts:
                deep = {"google": 3 if "cloud" in parts[1:2] else 2, "azure": 3 if "storage" in parts[1:2] else 2}.get(parts[0], 1)
                found.add(".".join(parts[:deep]).removesuffix(".py"))
    return found


def test_nothing_imports_what_the_image_leaves_out() -> None:
    names = [line for line in (DOCKER / "unneeded.txt").read_text().splitlines() if line and not line.startswith("#")]
    modules = modules_of(names)
    assert {"oci", "azure.storage.blob", "google.cloud.storage", "paramiko", "msal"} <= modules and "google" not in modules
    done = subprocess.run([sys.executable, "-c", BLOCKED, ",".join(sorted(modules))], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0 and "all imported" in done.stdout, done.stderr[-2000:]


def test_the_launcher_that_triton_compiles_at_first_use_compiles_and_loads_and_lacks_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton: a CPU build of torch")
    code = f"import sys; sys.path.insert(0, {str(DOCKER)!r}); import check_image, pathlib; print(check_image.compile_stub(pathlib.Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "cuda_utils" in done.stdout, done.stderr
    for lack in ({"PATH": str(tmp_path)}, {"CC": "/bin/false"}):
        env: dict[str, Any] = os.environ | lack
        failed = subprocess.run([sys.executable, "-c", code, str(tmp_path / next(iter(lack)))], capture_output=True, text=True, env=env, check=False)
        assert failed.returncode != 0 and ("Failed to find C compiler" in failed.stderr or "CalledProcessError" in failed.stderr), failed.stderr


@pytest.mark.soak
def test_the_build_runs_in_a_clean_root_folder_and_its_image_compiles_what_triton_needs() -> None:
    """Twenty minutes and 20 GB of disk: Debian, the whole environment from the package index, the last step, the entry point. No engine, no apex."""
    problem = chroot_image.problem()
    if problem:
        pytest.skip(f"no clean root folder: {problem}")
    with chroot_image.room() as place:
        build = chroot_image.Build(DOCKER / "Dockerfile", Path(place), "bookworm")
        root = build.target("launcher")
        print(build.output[-3000:])
        assert re.search(r"torch \S+, CUDA \S+; recorded: \S+\nTriton's launcher compiled and loaded: cuda_utils\S+, \d+ bytes", build.output)
        env = build.environment["launcher"] | {"HOME": "/tmp"}
        assert "Usage" in build.run(root, ["python", "launcher.py", "--help"], env, "/opt/launcher", "10001:10001")
        assert not (root / "opt/venv/lib/python3.11/site-packages/oci").exists()
        # Without the toolchain the same step fails, as the image did that had none.
        (root / "usr/bin/gcc").unlink()
        with pytest.raises(AssertionError, match="Failed to find C compiler"):
            build.run(root, ["python", "infra/docker/check_image.py"], env, "/opt/launcher", "10001:10001")
