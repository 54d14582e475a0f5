"""The manifests executed, in namespaces joined by veth pairs: pods killed, gang or pod restarted, the same bytes. About 110 s of CPU; needs root."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.run_folder import RunFolder
from tests.support import k8s_local, manifests
from tests.support.root import ROOT
from tests.system.test_training import copy_of, run_stage
from train.config import load_run
from train.loop.metrics import read_metrics
from train.run import places

_PATIENCE_S = 900


@pytest.fixture(scope="module")
def documents(kubectl: Path) -> list[manifests.Manifest]:
    if not k8s_local.available():
        pytest.skip("no namespaces: this test needs root and unshare")
    return manifests.build(kubectl, ROOT / "infra" / "k8s" / "overlays" / "cpu")


def named(documents: list[manifests.Manifest], kind: str, name: str) -> manifests.Manifest:
    (found,) = [copy.deepcopy(d) for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def sized(job: manifests.Manifest, count: int) -> manifests.Manifest:
    """An Indexed Job of this many pods."""
    job["spec"]["completions"] = job["spec"]["parallelism"] = count
    job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = str(count)
    return job


def settings(run: Path) -> dict[str, str]:
    """What the ConfigMap says; a local folder stands for s3. One rank in each pod."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {
        "LAUNCHER_RUN": str(run),
        "LAUNCHER_RETRIES": "3",
        "PATH": path,
        "CUDA_VISIBLE_DEVICES": "0",
        "PYTHONPATH": str(ROOT),
        "LAUNCHER_LEASE_S": "6",
    }


@pytest.fixture(scope="module")
def trained(documents: list[manifests.Manifest], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose run has images, a tokenizer and a dVAE: what encode needs."""
    root = tmp_path_factory.mktemp("trained")
    for stage in ("prepare", "tokenizer", "dvae"):
        run_stage(stage, str(root), [])
    return root


def codes(root: Path) -> list[str]:
    """Content hashes of a run's code sets: of every byte of every shard."""
    sets = (root / "tiny" / "codes" / "crop-0" / split / "manifest.json" for split in ("train", "validation"))
    return [json.loads(manifest.read_text())["content_hash"] for manifest in sets]


def test_a_killed_pod_of_encode_is_replaced_alone_and_the_codes_are_the_same_bytes(
    documents: list[manifests.Manifest], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    pods, alone = copy_of(trained, tmp_path / "pods"), copy_of(trained, tmp_path / "alone")
    job = sized(named(documents, "Job", "encode"), 2)
    begun = pods / "tiny" / "exits" / "encode.1-of-2" / "attempt-0" / "begin.json"
    killed: list[int] = []

    def disturb(cluster: k8s_local.Cluster) -> None:
        if not killed and begun.exists():
            killed.append(1)
            os.killpg(cluster.pods[1].pid, signal.SIGKILL)

    cluster = k8s_local.Cluster(job, tmp_path, settings(pods / "tiny"))
    assert cluster.run(disturb, timeout_s=_PATIENCE_S) == "Complete", cluster.output.read_text()
    assert cluster.events == ["pod 1: exit code 137, Count"], cluster.output.read_text()
    run_stage("encode", str(alone), [])
    assert codes(pods) == codes(alone)
    assert json.loads((pods / "tiny" / "encode" / "done.json").read_text())["versions"] == dict(
        zip(("0/train", "0/validation"), codes(alone), strict=True)
    )


def test_a_gang_of_dalle_with_a_killed_pod_restarts_and_ends_as_an_undisturbed_one(
    documents: list[manifests.Manifest], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run_stage("encode", str(trained), [])
    changes = {"dalle_fit.steps": 80, "dalle_fit.eval_every": 80}
    run, calm = (copy_of(trained, tmp_path / name, changes=changes) / "tiny" for name in ("pods", "calm"))
    killed: list[int] = []

    def disturb(cluster: k8s_local.Cluster) -> None:
        if not killed and list((run / "dalle" / "checkpoints").glob("*/meta.json")):
            killed.append(1)
            os.killpg(cluster.pods[1].pid, signal.SIGKILL)

    cluster = k8s_local.Cluster(named(documents, "JobSet", "dalle"), tmp_path, settings(run))
    assert cluster.run(disturb, timeout_s=_PATIENCE_S) == "Complete", cluster.output.read_text()
    assert cluster.restart == 1 and "RestartJobSet" in cluster.events, cluster.events
    begin = json.loads((run / "exits/dalle/attempt-1/begin.json").read_text())
    assert (begin["run_id"], begin["size"], begin["saved"] >= 5) == ("uid-1.1", 2, True)
    words = [sys.executable, str(ROOT / "launcher.py"), "dalle", str(calm), "--nproc", "2"]
    subprocess.run(words, check=True, capture_output=True, timeout=_PATIENCE_S)
    ends = [end_state(each) for each in (run, calm)]
    assert ends[0] == ends[1] and len(ends[0][0]) == 80


def end_state(run: Path) -> tuple[list[float], str]:
    """Every loss, and the identity of the weights."""
    losses = [point.value for point in read_metrics(str(run), "dalle")["train/loss"]]
    return losses, json.loads((run / "dalle" / "export" / "config.json").read_text())["content_hash"]


def test_divided_work_loses_one_poisoned_share_and_no_other(
    documents: list[manifests.Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = tmp_path / "tiny"
    places.claim(load_run("tiny", [f"run.root={tmp_path}"]), RunFolder(str(run)), "launcher.py prepare tiny")
    job = sized(named(documents, "Job", "prepare"), 2)
    # Share 1 is poisoned: its pod ends with 65 whatever is tried.
    container = job["spec"]["template"]["spec"]["containers"][0]
    container["command"] = ["sh", "-c", '[ "$JOB_COMPLETION_INDEX" = 0 ] || exit 65; exec "$@"', "sh", *container["command"]]
    cluster = k8s_local.Cluster(job, tmp_path, settings(run))
    cluster.run(lambda cluster: None, timeout_s=_PATIENCE_S)
    assert cluster.events == ["pod 1: exit code 65, FailIndex", "index 1 failed"], cluster.output.read_text()
    assert list((run / "images").rglob("done.json")), "share 0 was done"
