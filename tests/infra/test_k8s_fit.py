"""Kubernetes, fitted to a site: what its own file says reaches every overlay, namespaces, queues that are there or not, refusals. A real kubectl renders. About 15 s."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from infra import k8s_checks, k8s_submit, kubectl
from infra.errors import ConfigError
from infra.job import JobSpec
from infra.run_folder import RunFolder
from tests.support import kueue, manifests
from tests.support.root import ROOT
from train.config import load_run
from train.run import cluster

IMAGE = "registry.example/team/launcher@sha256:" + "0a" * 32
K8S = ROOT / "infra" / "k8s"
_RDMA = "rdma/hca_shared_devices_a"


@pytest.fixture
def with_kubectl(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")


def spec(stage: str, *values: str) -> JobSpec:
    cfg = load_run("tiny", ["run.root=s3://bucket/runs", f"cluster.image={IMAGE}", *(f"cluster.{value}" for value in values)])
    return cluster.job_spec(stage, cfg, RunFolder("s3://bucket/runs/tiny"))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the manifests whose site file has every recipe taken, as its comments say, and a certificate as an object of its own."""
    place = tmp_path_factory.mktemp("fitted") / "k8s"
    shutil.copytree(K8S, place)
    file = place / "site" / "kustomization.yaml"
    head, recipes = file.read_text().split("# Recipes:\n")
    lines = [line.removeprefix("# ") for line in recipes.splitlines()]
    added = "resources: [ca.yaml]\n"
    file.write_text(head.replace("patches: []\n", added) + "\n".join(lines) + "\n")
    (place / "site" / "ca.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ca, labels: {stage: shared}}\ndata: {ca.crt: PEM}\n")
    return place


@pytest.mark.parametrize("overlay", ["cpu", "gpu", "kueue", "kueue-topology"])
def test_every_recipe_of_the_site_file_reaches_the_jobs_of_every_overlay(kubectl: Path, fitted: Path, overlay: str) -> None:
    """What an overlay sets came behind the site once, and took its tolerations and its network cards away without a word."""
    documents = manifests.build(kubectl, fitted / "overlays" / overlay)
    assert [text for document in documents for text in manifests.schema_findings(document, "1.35")] + manifests.own_findings(documents) == []
    assert {d["metadata"]["namespace"] for d in documents if d["kind"] in ("Job", "JobSet", "ConfigMap", "ServiceAccount")} == {"team"}
    (settings,) = [d["data"] for d in documents if (d["kind"], d["metadata"]["name"]) == ("ConfigMap", "launcher")]
    assert {"S3_ENDPOINT_URL", "AWS_CA_BUNDLE", "HTTPS_PROXY", "NO_PROXY"} <= settings.keys()
    assert all(d["imagePullSecrets"] == [{"name": "registry"}] for d in documents if d["kind"] == "ServiceAccount")
    for document in documents:
        if document["kind"] not in ("Job", "JobSet"):
            continue
        ((_, template),) = manifests.pod_templates(document)
        assert document["metadata"]["labels"][k8s_checks.QUEUE] == "team-a"
        if document["kind"] == "Job":
            assert template["spec"]["nodeSelector"] == {"pool": "general"}
            continue
        assert template["spec"]["nodeSelector"] == {"pool": "training"} and template["spec"]["priorityClassName"] == "training"
        assert {each["key"] for each in template["spec"]["tolerations"]} == {"nvidia.com/gpu", "dedicated"}
        resources = template["spec"]["containers"][0]["resources"]
        assert resources["limits"][_RDMA] == resources["requests"][_RDMA] == "8"
        assert ("nvidia.com/gpu" in resources["limits"]) == (overlay != "cpu"), "and the overlay's stay beside them"


def test_what_a_key_says_goes_over_the_site_and_the_rest_of_it_stays(with_kubectl: None, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k8s_submit, "OVERLAYS", fitted / "overlays")
    monkeypatch.setattr(k8s_submit, "SITE", fitted / "site" / "kustomization.yaml")
    documents = manifests.load(k8s_submit.render(spec("dalle", "overlay=gpu", "gpus=4", "queue=mine")))
    (jobset,) = [d for d in documents if d["kind"] == "JobSet" and d["metadata"]["labels"]["stage"] == "dalle"]
    assert jobset["metadata"]["labels"][k8s_checks.QUEUE] == "mine" and jobset["metadata"]["namespace"] == "team", "no key named a namespace"
    resources = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (resources["nvidia.com/gpu"], resources[_RDMA]) == ("4", "8")
    assert k8s_submit.settled(spec("dalle", "namespace=mine")).cluster.namespace == "mine"


def test_a_gang_finds_the_objects_that_a_site_adds_under_their_new_names(with_kubectl: None, fitted: Path, tmp_path: Path) -> None:
    """A run's prefix renames what a site adds, and kustomize knows no JobSet: its volumes named what no longer was."""
    place = tmp_path / "mine"
    place.mkdir()
    room = "/spec/replicatedJobs/0/template/spec/template/spec"
    added = f'[{{"op": "add", "path": "{room}/volumes/-", "value": {{"name": "ca", "configMap": {{"name": "ca"}}}}}}]'
    (place / "kustomization.yaml").write_text(
        f"resources: [{os.path.relpath(fitted / 'overlays' / 'cpu', place)}]\npatches:\n  - target: {{kind: JobSet}}\n    patch: '{added}'\n"
    )
    documents = manifests.load(k8s_submit.render(spec("dalle", f"overlay={place}")))
    maps = {d["metadata"]["name"] for d in documents if d["kind"] == "ConfigMap" and d["metadata"]["labels"]["stage"] == "shared"}
    (jobset,) = [d for d in documents if d["kind"] == "JobSet" and d["metadata"]["labels"]["stage"] == "dalle"]
    ((_, template),) = manifests.pod_templates(jobset)
    (volume,) = [each for each in template["spec"]["volumes"] if each["name"] == "ca"]
    assert volume["configMap"]["name"] in maps and volume["configMap"]["name"] != "ca"


def test_a_namespace_is_the_keys_else_the_sites_else_the_default_one(with_kubectl: None) -> None:
    for values, name in (
        (("overlay=gpu",), "default"),
        (("overlay=infra/k8s/sites/aws",), "text-to-image"),
        (("overlay=infra/k8s/sites/aws", "namespace=team"), "team"),
    ):
        job = spec("dalle", *values)
        assert k8s_submit.settled(job).cluster.namespace == name
        assert {d["metadata"]["namespace"] for d in manifests.load(k8s_submit.render(job)) if d["kind"] == "JobSet"} == {name}
        assert f"--namespace={name}" in k8s_submit.shown(job)


def test_a_queue_of_ones_own_is_set_on_any_overlay_and_holds_the_job_back(with_kubectl: None) -> None:
    for stage, overlay in (("dalle", "gpu"), ("encode", "kueue")):
        documents = manifests.load(k8s_submit.render(spec(stage, f"overlay={overlay}", "queue=team-a")))
        (job,) = [d for d in documents if d["kind"] in ("Job", "JobSet") and d["metadata"]["labels"]["stage"] == stage]
        assert job["metadata"]["labels"][kueue.QUEUE] == "team-a" and job["spec"]["suspend"] is True
    (plain,) = [d for d in manifests.load(k8s_submit.render(spec("dalle"))) if d["metadata"]["name"] == spec("dalle").name and d["kind"] == "JobSet"]
    assert k8s_checks.QUEUE not in plain["metadata"]["labels"] and not plain["spec"].get("suspend")


def test_a_queue_that_the_namespace_lacks_is_refused_and_one_that_nobody_may_list_is_not(
    with_kubectl: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job = spec("dalle", "overlay=kueue", "namespace=team")
    texts = {job: k8s_submit.render(job) for job in (job, spec("dalle", "overlay=kueue", "topology=zone", "namespace=team"))}
    monkeypatch.setattr(k8s_submit, "render", lambda spec: texts[spec])
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def cluster_says(text: str) -> None:
        forbidden = "echo 'Error from server (Forbidden): you may not' >&2; exit 1" if text == "(Forbidden)" else f"echo '{text}'"
        (tmp_path / "kubectl").write_text(
            f'#!/bin/sh\ncase "$1 $2" in *queues*|*topologies*) {forbidden};; apply*) cat > /dev/null; echo created;; esac\n'
        )
        (tmp_path / "kubectl").chmod(0o755)

    cluster_says("team-a team-b")
    with pytest.raises(ConfigError, match=r"queue train: namespace team has no LocalQueue of this name \(it has: team-a, team-b\), .*cluster\.queue"):
        k8s_submit.submit(job)
    cluster_says("train")
    assert k8s_submit.submit(job) == "created\n"
    cluster_says("(Forbidden)")
    assert [k8s_submit.submit(each) for each in texts] == ["created\n"] * 2, "a tenant may not look at what is the administrator's"
    assert "may not list them: localqueues" in (said := capfd.readouterr().err) and "may not list them: topologies" in said


def test_an_overlay_without_a_job_to_fill_in_is_refused(with_kubectl: None) -> None:
    """A TrainJob was shown, and would have been applied, with two nodes and an image of no registry whatever the keys said."""
    with pytest.raises(ConfigError, match=r"cluster\.overlay = trainjob: it has no JobSet of the stage dalle that --on k8s could fill in"):
        k8s_submit.render(spec("dalle", "overlay=trainjob", "nodes=4"))
    with pytest.raises(ConfigError, match=r"cluster\.overlay = infra/k8s/parts/gpu: a Component, which is a part of others"):
        k8s_submit.render(spec("dalle", "overlay=infra/k8s/parts/gpu"))
    with pytest.raises(ConfigError, match=r"neither one of cpu, gpu, kueue, kueue-topology nor a folder"):
        k8s_submit.render(spec("dalle", "overlay=nowhere"))


def test_an_image_of_ones_own_reaches_a_train_job_by_hand(kubectl: Path, tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{os.path.relpath(K8S / 'overlays' / 'trainjob', tmp_path)}]\nimages: [{{name: {k8s_submit.IMAGE}, newName: reg.example/mine, newTag: '1'}}]\n"
    )
    built = subprocess.run([str(kubectl), "kustomize", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    images = set(re.findall(r"image: (\S+)", built))
    assert images == {"reg.example/mine:1"}


def test_an_image_without_a_digest_is_refused_with_the_way_to_one() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.image: 'reg/launcher:1' is not pinned by its digest.*docker buildx imagetools inspect"):
        load_run("tiny", ["cluster.image=reg/launcher:1"])
    assert load_run("tiny", [f"cluster.image=reg.example:5000/launcher:1@sha256:{'a' * 64}"]).cluster.image.startswith("reg.example:5000/")


def test_what_kubectl_says_is_shown_without_the_log_of_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for lines, said in (
        (
            ['E1130 02:33:15.467883   23573 memcache.go:265] "Unhandled Error"', "The connection was refused"],
            "ended with 1: The connection was refused$",
        ),
        (["E1130 02:33:15.467883   23573 run.go:72] nothing else"], "ended with 1: E1130 .* nothing else$"),
    ):
        (tmp_path / "kubectl").write_text("#!/bin/sh\n" + "".join(f"echo '{line}' >&2\n" for line in lines) + "exit 1\n")
        (tmp_path / "kubectl").chmod(0o755)
        with pytest.raises(ConfigError, match=said):
            kubectl.run(["get"])


def test_an_endpoint_that_only_the_submission_knows_is_said(with_kubectl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods would look for the bucket at AWS, and end with 78 once they run."""
    words = "S3_ENDPOINT_URL is set here, and in no setting of the pods"
    monkeypatch.delenv("S3_ENDPOINT_URL", raising=False)
    assert words not in k8s_submit.shown(spec("dalle"))
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://s3.example.com")
    assert f"# {words}" in k8s_submit.shown(spec("dalle"))
    assert words not in k8s_submit.shown(spec("dalle", "overlay=infra/k8s/sites/bare-metal")), "the site names one"
