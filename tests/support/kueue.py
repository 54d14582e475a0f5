"""Whether Kueue could ever admit a job of a set of manifests, as its documentation says: quota by flavor and resource, topology by the flavor's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.support import manifests

TOPOLOGY = tuple(f"kueue.x-k8s.io/podset-{kind}-topology" for kind in ("required", "preferred"))
QUEUE = "kueue.x-k8s.io/queue-name"
_UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def amount(quantity: str) -> int:
    """``"4Gi"`` -> bytes; whole numbers only."""
    digits = quantity.rstrip("KMGTi")
    return int(digits) * _UNITS[quantity[len(digits) :]]


def never_admitted(documents: list[manifests.Manifest]) -> list[str]:
    """Why jobs with a queue would wait for ever: no such queue, a resource that it does not cover, an amount or a level that no flavor of it has, or nodes
    whose taint the pods do not tolerate."""
    named = {(document["kind"], document["metadata"]["name"]): document for document in documents}
    found = []
    for document in documents:
        queue = document["metadata"].get("labels", {}).get(QUEUE)
        where = f"{document['kind']} {document['metadata']['name']}"
        if queue is not None and ("LocalQueue", queue) not in named:
            found.append(f"{where}: no LocalQueue {queue}")
        elif queue is not None:
            cluster = named["LocalQueue", queue]["spec"]["clusterQueue"]
            for job, template in manifests.pod_templates(document):
                found += [f"{where}: {text}" for text in _obstacles(named, cluster, job, template)]
    return found


def _obstacles(named: dict[tuple[str, str], Any], cluster: str, job: manifests.Manifest, template: manifests.Manifest) -> Iterator[str]:
    (group,) = named["ClusterQueue", cluster]["spec"]["resourceGroups"]
    (container,) = template["spec"]["containers"]
    asked = {name: amount(value) * job["completions"] for name, value in container["resources"]["requests"].items()}
    missing = sorted(asked.keys() - set(group["coveredResources"]))
    if missing:
        yield f"asks for {', '.join(missing)}, which ClusterQueue {cluster} does not cover"
        return
    reasons = [_reason(named, flavor, asked, template) for flavor in group["flavors"]]
    chosen = next((flavor["name"] for flavor, reason in zip(group["flavors"], reasons, strict=True) if not reason), None)
    if chosen is None:
        yield f"fits no flavor ({'; '.join(reasons)})"
        return
    labels = named["ResourceFlavor", chosen].get("spec", {}).get("nodeLabels", {})
    tolerated = {each["key"] for each in template["spec"].get("tolerations", [])}
    if "nvidia.com/gpu.present" in labels and "nvidia.com/gpu" not in tolerated:
        yield f"would go to {chosen}, whose taint it does not tolerate"


def _reason(named: dict[tuple[str, str], Any], flavor: Any, asked: dict[str, int], template: manifests.Manifest) -> str:
    """Why a flavor cannot take a job, or nothing."""
    quota = {each["name"]: amount(each["nominalQuota"]) for each in flavor["resources"]}
    short = [name for name, value in asked.items() if value > quota[name]]
    if short:
        return f"{flavor['name']}: not enough {', '.join(sorted(short))}"
    topology = named["ResourceFlavor", flavor["name"]].get("spec", {}).get("topologyName")
    levels = [level["nodeLabel"] for level in named["Topology", topology]["spec"]["levels"]] if topology else []
    wanted = [template["metadata"].get("annotations", {}).get(key) for key in TOPOLOGY]
    odd = [level for level in wanted if level is not None and level not in levels]
    return f"{flavor['name']}: has no level {odd[0]} (it has: {levels})" if odd else ""
