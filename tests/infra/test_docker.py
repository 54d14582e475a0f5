"""Images and the cluster's documentation: linted, and their steps run as far as they go without an engine. About 15 s."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from infra import storage
from tests.support import manifests
from tests.support import slurm_stand_in as stand_in
from tests.support.root import ROOT

DOCKER = ROOT / "infra" / "docker"
FILES = sorted(DOCKER.glob("Dockerfile*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_and_root_is_given_up(path: Path) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "hadolint"), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    last = path.read_text().split("\nFROM ")[-1]
    assert "USER 10001:10001" in last and '"--block-signal=USR2,TERM,INT"' in last
    for source in re.findall(r"^COPY (?!--from)(?!\. )(.*) \S+$", path.read_text(), re.M):
        assert all((ROOT / word).exists() for word in source.split()), source


def test_hadolint_can_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    done = subprocess.run([str(Path(sys.executable).parent / "hadolint"), str(tmp_path / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode != 0


def test_the_context_holds_what_runs_and_no_secrets() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*" and "**/*.env" in lines
    assert {line[1:] for line in lines if line.startswith("!")} >= {"launcher.py", "model", "train", "infra", "data_pipeline", "requirements.txt"}
    assert all((ROOT / line[1:]).exists() for line in lines if line.startswith("!"))


def test_the_install_steps_run_in_order_and_stop_at_the_first_failure(tmp_path: Path) -> None:
    """The script, with a python3 that makes environments whose python records what it is asked."""
    recorder = f'#!/bin/sh\necho "$PIP_INDEX_URL $@" >> {tmp_path}/asked\ncase "$*" in *"$FAIL"*) exit 3;; esac\n'
    (tmp_path / "recorder").write_text(recorder)
    maker = f'#!/bin/sh\n[ "$1" = -m ] || exit ${{OLD:-0}}\nmkdir -p "$3/bin" "$3/lib"; cp {tmp_path}/recorder "$3/bin/python"; chmod +x "$3/bin/python"\n'
    (tmp_path / "python3").write_text(maker)
    (tmp_path / "python3").chmod(0o755)

    def install(**environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "FAIL": "nothing"} | environment
        return subprocess.run([str(DOCKER / "install.sh"), str(tmp_path / "venv"), str(tmp_path / "build")], capture_output=True, text=True, env=env)

    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "unneeded.txt").write_text("# why\noci\nmsal\n")
    assert install(TORCH_INDEX="https://index").returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    assert (
        asked[0].startswith("https://index ")
        and asked[0].endswith("torch torchvision")
        and f"-r {tmp_path}/build/requirements.txt" in asked[1]
        and asked[2] == " -m pip check"
        and asked[3] == " -m pip uninstall -q -y oci msal"
    )
    assert all(f"-c {tmp_path}/build/constraints.txt" in line for line in asked[:2])
    (tmp_path / "asked").unlink()
    assert install(FAIL="requirements.txt").returncode == 3 and len((tmp_path / "asked").read_text().splitlines()) == 1
    assert install(OLD="1").returncode == 78
    (tmp_path / "asked").unlink()
    assert install(CLOUDS="gcsfs google-auth-oauthlib").returncode == 0
    last = (tmp_path / "asked").read_text().splitlines()[-2]
    assert " -m pip install " in last and last.endswith(f"-c {tmp_path}/build/constraints.txt gcsfs google-auth-oauthlib"), "after the removal"


def commands(fence: str) -> list[str]:
    text = (ROOT / "docs" / "cluster.md").read_text()
    return [line for block in re.findall(rf"```{fence}\n(.*?)```", text, re.S) for line in block.strip().splitlines()]


def test_every_command_of_the_cluster_page_runs(tmp_path: Path) -> None:
    """Those fenced as bash, in a copy of nothing but their run folder, against stand-ins for SLURM. (What ssh would start is fenced as sh: tests/system/test_by_hand.py.)"""
    env = os.environ | stand_in.install(tmp_path / "slurm")
    script = "\n".join(["set -e", *commands("bash")]).replace("python ", f"{sys.executable} ").replace("runs", str(tmp_path / "runs"))
    done = subprocess.run(
        ["bash", "-c", script.replace(f"{sys.executable} launcher.py doctor\n", "", 1)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    submitted = [call for call in stand_in.calls(tmp_path / "slurm", "sbatch") if "--test-only" not in call]
    assert len(submitted) == 10


KUBECTL = """#!/bin/sh
# Records every call. What it can do without a server is done by the real one: build overlays, make a secret.
printf '%s\\n' "$*" >> "$RECORD/calls"
case "$1 $2" in
    "kustomize "*) exec "$REAL" "$@" ;;
    "create secret") exec "$REAL" "$@" --dry-run=client -o yaml ;;
    "apply -k") exec "$REAL" kustomize "$3" ;;
    "apply -f") exec cat ;;
    "get jobset") exit 0 ;; # there is none
    "get "* | "describe "* | "taint nodes" | "cordon "* | "delete "* | "port-forward "*) exit 0 ;; # what only a cluster can answer
esac
exit 64
"""


def test_every_kubectl_command_of_the_cluster_page_runs(tmp_path: Path, s3: str, kubectl: Path) -> None:
    """Those fenced as console and those within the text, as they stand there but for names of places."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "kubectl").write_text(KUBECTL)
    (tmp_path / "bin" / "kubectl").chmod(0o755)
    (tmp_path / "credentials.env").write_text("AWS_ACCESS_KEY_ID=key\n")
    (tmp_path / "FILE").write_text("[default]\n")
    (tmp_path / "bin" / "docker").write_text('#!/bin/sh\nprintf "# docker %s\\n" "$*"\n')
    (tmp_path / "bin" / "docker").chmod(0o755)
    words = [*commands("console"), *re.findall(r"`(kubectl [^`]+)`", (ROOT / "docs" / "cluster.md").read_text())]
    places = {
        "python ": f"{sys.executable} ",
        "PRESET": "tiny dalle_fit.batch=32",  # of 4 machines with 8 GPUs
        "s3://bucket/runs": s3,
        "sha256:...": f"sha256:{'0a' * 32}",
        "credentials.env": f"{tmp_path}/credentials.env",
        "credentials=FILE": f"credentials={tmp_path}/FILE",
    }
    for stage in ("tokenizer", "encode"):  # what the example's stage needs
        storage.write_bytes(f"{s3}/tiny/{stage}/done.json", b"{}")
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "RECORD": str(tmp_path), "REAL": str(kubectl)}
    found = []
    for line in words:
        for name, place in places.items():
            line = line.replace(name, place)
        done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
        assert done.returncode == 0, line + done.stderr
        documents = manifests.load(done.stdout)
        selector = re.search(r"stage in \(([\w,]+)\)", line)
        chosen = selector[1].split(",") if selector else ["dalle", "shared"] if "launcher.py" in line else []
        chosen += ["queues"] if "stage=queues" in line else []
        assert not chosen or {d["metadata"]["labels"]["stage"] for d in documents} >= set(chosen), line
        found.append([d["kind"] for d in documents])
    assert found[0] == ["Secret"] and "JobSet" in found[1] and len(found) == len(words) > 12
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[1].startswith("kustomize ") and calls[2].startswith("get jobset ") and calls[3] == "apply -f - -l stage in (dalle,shared)"


def test_files_and_keys_that_the_cluster_page_names_exist() -> None:
    from infra.job import ClusterConfig

    text = (ROOT / "docs" / "cluster.md").read_text()
    for path in re.findall(r"`((?:infra|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    for key in re.findall(r"\bcluster\.(\w+)=?", text):
        assert key in ClusterConfig.model_fields or key == "md", key
