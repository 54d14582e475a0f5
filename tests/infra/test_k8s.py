"""Kubernetes: every overlay built by a real kubectl and checked against the schemas of nine versions; rules told apart; what kubectl is given. About 40 s."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import k8s_submit
from infra.errors import ConfigError
from infra.job import ClusterConfig, JobSpec, Shape
from tests.support import manifests
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.run.stage_table import STAGES

OVERLAYS = ("cpu", "gpu", "kueue", "kueue-topology", "trainjob")
SITES = ("aws", "gke", "bare-metal")
K8S = ROOT / "infra" / "k8s"
IMAGE = "registry.example/team/launcher@sha256:" + "0a" * 32


@pytest.fixture(scope="module")
def built(kubectl: Path) -> dict[str, list[manifests.Manifest]]:
    places = {name: K8S / "overlays" / name for name in OVERLAYS} | {name: K8S / "sites" / name for name in SITES}
    return {name: manifests.build(kubectl, place) for name, place in places.items()}


@pytest.fixture
def with_kubectl(kubectl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{kubectl.parent}:{os.environ['PATH']}")


def spec(stage: str = "dalle", shape: Shape = "gang", **values: Any) -> JobSpec:
    return JobSpec(stage, "My Run", "s3://bucket/runs/My Run", shape, ClusterConfig(**({"image": IMAGE} | values)))


def find(documents: list[manifests.Manifest], kind: str, stage: str) -> manifests.Manifest:
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["labels"].get("stage") == stage]
    return found


@pytest.mark.parametrize("name", [*OVERLAYS, *SITES])
def test_an_overlay_passes_the_strict_schemas_and_our_own_checks(built: dict[str, list[manifests.Manifest]], name: str) -> None:
    findings = [text for document in built[name] for version in manifests.VERSIONS for text in manifests.schema_findings(document, version)]
    assert findings + manifests.own_findings(built[name]) == []
    if name != "trainjob":
        assert {d["metadata"]["labels"]["stage"] for d in built[name] if d["kind"] in ("Job", "JobSet")} == set(STAGES)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "completionMod"), "Indexed", "completionMod"),
        (("spec", "completionMode"), "Indexd", "completionMode = Indexd"),
        (("spec", "backoffLimitPerIndex"), -1, "backoffLimitPerIndex = -1"),
        (("spec", "completions"), 9, "JOB_COMPLETIONS = 4, completions 9"),
        (("spec", "template", "spec", "serviceAccountName"), "nobody", "no ServiceAccount nobody"),
        (("spec", "template", "spec", "volumes"), [], "no volume shm"),
        (("metadata", "name"), "Prepare_1", "no DNS label"),
        (("spec", "template", "spec", "containers", 0, "resources", "limits", "memory"), "4Gib", "is no quantity"),
    ],
)
def test_the_checks_see_planted_errors(built: dict[str, list[manifests.Manifest]], path: tuple[Any, ...], value: Any, message: str) -> None:
    documents = copy.deepcopy(built["cpu"])
    node: Any = find(documents, "Job", "prepare")
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    findings = [text for document in documents for text in manifests.schema_findings(document, "1.33")] + manifests.own_findings(documents)
    assert any(message in text for text in findings), findings


def test_crds_refuse_planted_errors(built: dict[str, list[manifests.Manifest]]) -> None:
    jobset = copy.deepcopy(find(built["cpu"], "JobSet", "dalle"))
    jobset["spec"]["failurePolicy"]["rules"][0]["action"] = "Explode"
    jobset["spec"]["replicatedJobz"] = []
    found = " ".join(manifests.schema_findings(jobset, "1.33"))
    assert "Explode" in found and "replicatedJobz" in found
    assert "no CRD" in manifests.schema_findings({"apiVersion": "a.b/v1", "kind": "X", "metadata": {"name": "x"}}, "1.33")[0]
    (gpu,) = [each for each in built["kueue-topology"] if each["kind"] == "ResourceFlavor" and each["metadata"]["name"] == "gpu-nodes"]
    flavor = gpu | {"apiVersion": "kueue.x-k8s.io/v1beta1"}
    assert manifests.schema_findings(flavor, "1.33") == ["kueue.x-k8s.io/v1beta1 ResourceFlavor: deprecated; current: v1beta2"]
    bare = copy.deepcopy(gpu)
    del bare["spec"]["nodeLabels"]
    assert "at least one nodeLabel is required when topology is set" in " ".join(manifests.schema_findings(bare, "1.33")), "a rule, not a type"


@pytest.mark.parametrize("overlay", ["cpu", "trainjob"])
@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        *((code, False, "FailJobSet") for code in (64, 65, 78, 93)),
        (78, True, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, False, "RestartJobSet"),
        (137, False, "RestartJobSet"),
    ],
)
def test_the_rules_of_a_gang(built: dict[str, list[manifests.Manifest]], overlay: str, code: int, disrupted: bool, action: str) -> None:
    if overlay == "cpu":
        jobset = find(built[overlay], "JobSet", "dalle")["spec"]
    else:
        jobset = find(built[overlay], "TrainingRuntime", "dalle")["spec"]["template"]["spec"]
    job = jobset["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and all(rule["action"] != "Ignore" for rule in job["podFailurePolicy"]["rules"])
    done, message = manifests.job_failure(job, code, disrupted=disrupted)
    reason = "PodFailurePolicy" if done == "FailJob" else "BackoffLimitExceeded"
    assert manifests.jobset_action(jobset, reason, message) == action


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [(64, False, "FailIndex"), (65, False, "FailIndex"), (78, True, "FailIndex"), (75, False, "Ignore"), (143, True, "Ignore"), (1, False, "Count")],
)
def test_the_rules_of_divided_work(built: dict[str, list[manifests.Manifest]], code: int, disrupted: bool, action: str) -> None:
    job = find(built["cpu"], "Job", "encode")["spec"]
    assert manifests.job_failure(job, code, disrupted=disrupted)[0] == action
    assert job["backoffLimitPerIndex"] == 3 and 1 <= job["maxFailedIndexes"] < job["completions"]


@pytest.mark.parametrize("overlay", [*OVERLAYS, *SITES])
def test_pods_are_confined_sized_and_get_time_to_save(built: dict[str, list[manifests.Manifest]], overlay: str) -> None:
    from infra.signals import SHUTDOWN_S

    for document in built[overlay]:
        for _, template in manifests.pod_templates(document):
            pod = template["spec"]
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            (container,) = pod["containers"]
            locks = {"add": ["IPC_LOCK"]} if overlay == "bare-metal" and document["kind"] == "JobSet" else {}
            rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]} | locks}
            assert container["securityContext"] == rights
            if document["kind"] != "TrainingRuntime":  # there the TrainJob says it
                assert container["resources"]["requests"] == container["resources"]["limits"]
            secret = "launcher-s3-read" if document["kind"] == "Deployment" else "launcher-s3"
            assert {"secretRef": {"name": secret, "optional": True}} in container["envFrom"], (
                "secrets by reference, or none where an account has a role"
            )
            (mounted,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
            assert mounted == {"secretName": secret, "optional": True, "defaultMode": 0o440}, "rotated keys come as a file"
            assert {"name": "s3", "mountPath": "/var/run/launcher-s3", "readOnly": True} in container["volumeMounts"]
            place = {"name": "AWS_SHARED_CREDENTIALS_FILE", "value": "/var/run/launcher-s3/credentials"}
            assert place in (container.get("env") or find(built[overlay], "TrainJob", "dalle")["spec"]["trainer"]["env"])
            if document["kind"] != "Deployment":
                assert pod["terminationGracePeriodSeconds"] > SHUTDOWN_S
                assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory" and container["volumeMounts"][0]["mountPath"] == "/dev/shm"
    assert not any(d["kind"] == "Secret" for d in built[overlay])


def test_a_job_is_filled_in_and_nothing_else_changes(with_kubectl: None) -> None:
    gang = spec(nodes=4, gpus=8, cpus=96, memory_gib=900, shm_gib=128, overlay="gpu", namespace="team", retries=5)
    documents = manifests.load(k8s_submit.render(gang))
    assert manifests.own_findings(documents) == []
    assert [text for document in documents for text in manifests.schema_findings(document, "1.35")] == []
    assert {d["metadata"]["namespace"] for d in documents} == {"team"}
    jobset = find(documents, "JobSet", "dalle")
    assert jobset["metadata"]["name"] == gang.name and gang.name.startswith("my-run-")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert (job["completions"], job["parallelism"], container["env"][0]) == (4, 4, {"name": "LAUNCHER_NODES", "value": "4"})
    assert container["image"] == IMAGE and container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    settings = find(documents, "ConfigMap", "shared")
    assert settings["data"]["LAUNCHER_RUN"] == gang.run_url and settings["data"]["LAUNCHER_RETRIES"] == "5"
    array = find(manifests.load(k8s_submit.render(spec("encode", "array", shares=40))), "Job", "encode")["spec"]
    assert (array["completions"], array["maxFailedIndexes"], array["template"]["spec"]["containers"][0]["env"][0]["value"]) == (40, 10, "40")


def test_kubectl_gets_exactly_what_was_shown(tmp_path: Path, with_kubectl: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = k8s_submit.shown(spec())
    (tmp_path / "kubectl").write_text(
        '#!/bin/sh\n[ "$1" != get ] || exit 0\nprintf "%s\\n" "$@" > "$RECORD/argv"\ncat > "$RECORD/bytes"\necho "jobset.jobset.x-k8s.io/x created"\n'
    )
    (tmp_path / "kubectl").chmod(0o755)
    rendered = k8s_submit.render(spec())
    monkeypatch.setattr(k8s_submit, "render", lambda spec: rendered)
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert k8s_submit.submit(spec()) == "jobset.jobset.x-k8s.io/x created\n"
    assert (tmp_path / "argv").read_text().splitlines() == ["apply", "-f", "-", "-l", "stage in (dalle,shared)"]
    assert (tmp_path / "bytes").read_text() == rendered and shown.endswith(rendered)


def test_what_kubernetes_cannot_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"needs cluster\.image=registry/name@sha256"):
        k8s_submit.overlay(spec(image=""))
    with pytest.raises(ConfigError, match=r"pods share no disk; set run\.root=s3://"):
        k8s_submit.overlay(JobSpec("dalle", "r", "runs/r", "gang", ClusterConfig(image=IMAGE)))
    with pytest.raises(ConfigError, match=r"cluster\.overlay = gpus: neither one of cpu, gpu, .* nor a folder with a kustomization\.yaml"):
        k8s_submit.overlay(spec(overlay="gpus"))
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho 'error: forbidden' >&2; exit 1\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError, match="ended with 1: error: forbidden"):
        k8s_submit.submit(spec())
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="kubectl is not installed here"):
        k8s_submit.submit(spec())


def test_the_command_line_shows_before_it_acts(with_kubectl: None, s3: str) -> None:
    words = ["dalle", "tiny", f"run.root={s3}", f"cluster.image={IMAGE}", "cluster.nodes=2", "--on", "k8s"]
    done = subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words, "--dry-run"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "kubectl apply -f - -l 'stage in (dalle,shared)'" in done.stdout and "kind: JobSet" in done.stdout
    overlay = json.loads(done.stdout.split("# overlay\n")[1].split("\n# kubectl")[0])
    assert overlay["configMapGenerator"][0]["literals"][0] == f"LAUNCHER_RUN={s3}/tiny"
    chain = subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words, "--chain"], capture_output=True, text=True, timeout=PATIENCE_S)
    assert chain.returncode == 78 and "Kubernetes starts jobs at once" in chain.stderr
