"""Kubernetes: what stages ask for, what a site changes, what Kueue could admit. Rendered by a real kubectl. About 20 s."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra import k8s_submit, slurm_submit
from infra.errors import ConfigError
from infra.job import ClusterConfig, JobSpec
from infra.run_folder import RunFolder
from tests.support import kueue, manifests
from tests.support.root import ROOT
from train.config import load_run
from train.run.cluster import job_spec
from train.run.stage_table import STAGES

IMAGE = "registry.example/team/launcher@sha256:" + "0a" * 32
K8S = ROOT / "infra" / "k8s"


@pytest.fixture
def with_kubectl(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")


def spec(stage: str, *values: str) -> JobSpec:
    cfg = load_run("tiny", ["run.root=s3://bucket/runs", f"cluster.image={IMAGE}", *(f"cluster.{value}" for value in values)])
    return job_spec(stage, cfg, RunFolder("s3://bucket/runs/tiny"))


def rendered(job: JobSpec) -> manifests.Manifest:
    """The job that a submission would apply."""
    (found,) = [d for d in manifests.load(k8s_submit.render(job)) if d["metadata"]["name"] == job.name and d["kind"] in ("Job", "JobSet")]
    return found


def container_of(document: manifests.Manifest) -> dict[str, Any]:
    ((_, template),) = manifests.pod_templates(document)
    found: dict[str, Any] = template["spec"]["containers"][0]
    return found


def test_gpus_cpus_and_memory_are_the_stages_own() -> None:
    """32 GPUs of 4 nodes are for training: reading a data set takes none."""
    rooms = {stage: spec(stage, "gpus=8", "nodes=4", "cpus=96", "memory_gib=1024").room for stage in STAGES}
    assert {stage for stage, room in rooms.items() if room.gpus == 0} == {"prepare", "tokenizer", "report"}
    assert {stage for stage, room in rooms.items() if room.gpus == 1} == {"encode", "generate", "evaluate"}
    assert {(room.gpus, room.cpus, room.memory_gib) for stage, room in rooms.items() if STAGES[stage].trains} == {(8, 96, 1024)}
    assert {(room.cpus, room.memory_gib) for stage, room in rooms.items() if not STAGES[stage].trains} == {(12, 128)}
    own = spec("encode", "gpus=8", "share_cpus=20", "share_memory_gib=200").room
    assert (own.cpus, own.memory_gib) == (20, 200)
    assert {(room.gpus, room.cpus, room.memory_gib) for room in (spec(stage).room for stage in STAGES)} == {(0, 8, 32)}, "as ever without GPUs"


def test_slurm_is_asked_for_the_same(tmp_path: Path) -> None:
    words = {stage: slurm_submit.sbatch(spec(stage, "gpus=8", "nodes=4", "cpus=96", "memory_gib=1024")) for stage in ("prepare", "encode", "dalle")}
    assert not [word for word in words["prepare"] if word.startswith("--gpus")] and "--cpus-per-task=12" in words["prepare"]
    assert {"--gpus-per-node=1", "--nodes=1", "--mem=128G"} <= set(words["encode"])
    assert {"--gpus-per-node=8", "--nodes=4", "--mem=1024G"} <= set(words["dalle"])


def test_pods_of_a_stage_ask_for_its_gpus_on_every_overlay(with_kubectl: None) -> None:
    asked = {}
    for stage in ("prepare", "encode", "dalle"):
        document = rendered(spec(stage, "gpus=8", "overlay=gpu"))
        ((_, template),) = manifests.pod_templates(document)
        resources = template["spec"]["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]
        asked[stage] = resources["limits"].get("nvidia.com/gpu")
        assert bool(template["spec"].get("tolerations")) == (stage != "prepare"), "only who wants a GPU goes where they are"
    assert asked == {"prepare": None, "encode": "1", "dalle": "8"}
    assert "nvidia.com/gpu" not in container_of(rendered(spec("dalle", "overlay=gpu")))["resources"]["limits"], "gpus = 0 takes the overlay's away"


def test_disk_is_the_overlays_unless_a_key_says_more(with_kubectl: None) -> None:
    """20 GiB under a /tmp of 200 GiB was an eviction at every save of a large model."""
    for values, disk in ((("overlay=cpu",), "20Gi"), (("overlay=gpu", "gpus=8"), "200Gi"), (("overlay=gpu", "gpus=8", "disk_gib=900"), "900Gi")):
        document = rendered(spec("dalle", *values))
        ((_, template),) = manifests.pod_templates(document)
        resources = template["spec"]["containers"][0]["resources"]
        sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in template["spec"]["volumes"] if "emptyDir" in volume}
        assert resources["limits"]["ephemeral-storage"] == resources["requests"]["ephemeral-storage"] == sizes["tmp"] == disk


@pytest.mark.parametrize("overlay", ["kueue", "kueue-topology"])
def test_kueue_could_admit_every_job_of_its_overlays(kubectl: Path, overlay: str) -> None:
    assert kueue.never_admitted(manifests.build(kubectl, K8S / "overlays" / overlay)) == []


def test_what_kueue_never_admits_is_seen(kubectl: Path) -> None:
    documents = manifests.build(kubectl, K8S / "overlays" / "kueue-topology")

    def changed(kind: str, name: str, change: Callable[[Any], object]) -> str:
        copies = copy.deepcopy(documents)
        (found,) = [each for each in copies if (each["kind"], each["metadata"]["name"]) == (kind, name)]
        change(found["spec"])
        return " ".join(kueue.never_admitted(copies))

    assert "JobSet dalle: fits no flavor (cpu-nodes: not enough" in changed("ResourceFlavor", "gpu-nodes", lambda spec: spec.pop("topologyName"))
    assert "gpu-nodes: has no level topology.kubernetes.io/zone" in changed("ResourceFlavor", "gpu-nodes", lambda spec: spec.pop("topologyName"))
    uncovered = changed("ClusterQueue", "train", lambda spec: spec["resourceGroups"][0]["coveredResources"].remove("ephemeral-storage"))
    assert "asks for ephemeral-storage, which ClusterQueue train does not cover" in uncovered
    alone = changed("ClusterQueue", "train", lambda spec: spec["resourceGroups"][0]["flavors"].pop(0))
    assert "Job prepare: would go to gpu-nodes, whose taint it does not tolerate" in alone
    small = [each if each["kind"] != "LocalQueue" else each | {"metadata": {"name": "other"}} for each in documents]
    assert "no LocalQueue train" in kueue.never_admitted(small)[0]


def test_a_level_of_ones_own_is_set_and_one_that_the_cluster_lacks_is_refused(
    with_kubectl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = spec("dalle", "overlay=kueue", "gpus=8", "topology=example.com/rack")
    ((_, template),) = manifests.pod_templates(rendered(job))
    assert template["metadata"]["annotations"][k8s_submit.TOPOLOGY] == "example.com/rack"
    ((_, plain),) = manifests.pod_templates(rendered(spec("dalle", "overlay=kueue", "gpus=8")))
    assert k8s_submit.TOPOLOGY not in plain["metadata"]["annotations"]
    text = k8s_submit.render(job)
    monkeypatch.setattr(k8s_submit, "render", lambda spec: text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for levels, refused in (("topology.kubernetes.io/zone kubernetes.io/hostname", True), ("example.com/rack kubernetes.io/hostname", False)):
        (tmp_path / "kubectl").write_text(f'#!/bin/sh\ncase "$2" in topologies*) echo "{levels}";; localqueues*) echo train;; esac\n')
        (tmp_path / "kubectl").chmod(0o755)
        if refused:
            with pytest.raises(
                ConfigError, match=r"no Topology of this cluster has such a level \(it has: topology\.kubernetes\.io/zone, kubernetes\.io/h"
            ):
                k8s_submit.submit(job)
        else:
            k8s_submit.submit(job)


@pytest.mark.parametrize(
    ("site", "endpoint", "resource", "rest"),
    [
        ("aws", None, "vpc.amazonaws.com/efa", {"nodeSelector": {"node.kubernetes.io/instance-type": "p5.48xlarge"}}),
        ("gke", "https://storage.googleapis.com", None, {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}),
        ("bare-metal", "http://s3.storage:8333", "rdma/hca_shared_devices_a", {"priorityClassName": "training"}),
    ],
)
def test_a_site_is_any_folder_and_reaches_the_job(
    with_kubectl: None, site: str, endpoint: str | None, resource: str | None, rest: dict[str, Any]
) -> None:
    job = spec("dalle", f"overlay=infra/k8s/sites/{site}", "gpus=8", "nodes=4", "namespace=team")
    documents = manifests.load(k8s_submit.render(job))
    assert manifests.own_findings(documents) == [] and {d["metadata"]["namespace"] for d in documents} == {"team"}
    document = rendered(job)
    ((_, template),) = manifests.pod_templates(document)
    assert rest.items() <= template["spec"].items()
    limits = template["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8" and (resource is None or resource in limits), "what a site asks for stays beside what keys say"
    (settings,) = [d["data"] for d in documents if d["kind"] == "ConfigMap"]
    assert settings.get("S3_ENDPOINT_URL") == endpoint and "NCCL_SOCKET_IFNAME" in settings and "GLOO_SOCKET_IFNAME" in settings
    accounts = {d["metadata"]["labels"]["stage"]: d for d in documents if d["kind"] == "ServiceAccount"}
    assert set(accounts) == {"shared", "tensorboard"}
    roles = [each["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn") for each in accounts.values()]
    assert len(set(roles)) == (2 if site == "aws" else 1), "TensorBoard's role is another one"
    assert all(bool(each.get("imagePullSecrets")) == (site == "bare-metal") for each in accounts.values())
    if site == "bare-metal":
        assert template["metadata"]["annotations"]["k8s.v1.cni.cncf.io/networks"] == "network/infiniband"
        assert template["spec"]["containers"][0]["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_the_base_forces_no_endpoint(kubectl: Path) -> None:
    documents = manifests.build(kubectl, K8S / "overlays" / "gpu")
    (settings,) = [d["data"] for d in documents if d["kind"] == "ConfigMap"]
    assert set(settings) == {"LAUNCHER_RUN", "LAUNCHER_RETRIES"}


def test_a_folder_of_ones_own_on_top_of_an_overlay_is_taken(with_kubectl: None, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "kustomization.yaml").write_text(
        json.dumps({"resources": [os.path.relpath(K8S / "overlays" / "cpu", place)], "commonAnnotations": {"x": "y"}})
    )
    assert rendered(spec("dalle", f"overlay={place}"))["metadata"]["annotations"]["x"] == "y"


def test_tensorboard_reads_the_runs_folder_with_its_own_key_and_is_reached_by_port_forwarding(with_kubectl: None) -> None:
    job = spec("dalle", "tensorboard=true")
    assert k8s_submit.selection(job) == "stage in (dalle,shared,tensorboard)" and k8s_submit.selection(spec("dalle")) == "stage in (dalle,shared)"
    documents = [d for d in manifests.load(k8s_submit.render(job)) if d["metadata"]["labels"]["stage"] == "tensorboard"]
    kinds = {d["kind"]: d for d in documents}
    assert set(kinds) == {"ServiceAccount", "Deployment", "Service", "NetworkPolicy"}
    pod = kinds["Deployment"]["spec"]["template"]
    container = pod["spec"]["containers"][0]
    assert pod["spec"]["serviceAccountName"] == kinds["ServiceAccount"]["metadata"]["name"]
    assert container["command"][1:4] == ["launcher.py", "tensorboard", "$(LAUNCHER_RUN)"], "what follows a run on S3"
    assert "launcher-s3-read" in json.dumps(pod) and '"launcher-s3"' not in json.dumps(pod), "a key that cannot write"
    policy = kinds["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items() and policy["policyTypes"] == ["Ingress"]
    assert not policy.get("ingress"), "nobody else's pods"


def test_defaults_of_the_new_keys_are_what_was_before() -> None:
    plain = ClusterConfig()
    assert (plain.share_cpus, plain.share_memory_gib, plain.disk_gib, plain.topology, plain.tensorboard, plain.overlay) == (0, 0, 0, "", False, "cpu")
