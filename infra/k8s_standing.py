"""What a cluster already holds under the name of a job that is to be submitted: nothing, a live job, or one that has ended. No torch.

The name stands for one stage of one run folder (``JobSpec.name``), so a job of that name is an earlier submission of the same stage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from infra import kubectl
from infra.errors import ConfigError
from infra.job import JobSpec

ASKED = "text-to-image/asked"
"""Annotation that keeps, as JSON, the values that a job was submitted with. Kubernetes changes specs (defaults, webhooks, Kueue), so specs cannot be compared."""
_ENDS = {"Complete": "finished", "Completed": "finished", "Failed": "failed"}
"""Conditions of a Job and of a JobSet that are final."""
WAIT_S = 900
"""Seconds that pods of an ended job get to disappear: longer than their grace period."""


@dataclass(frozen=True)
class Standing:
    """A job of the same name."""

    kind: str
    name: str
    state: Literal["live", "finished", "failed"]
    asked: dict[str, str]


def kind(spec: JobSpec) -> str:
    """Kind of the job's object, as kubectl names it."""
    return "jobset" if spec.shape == "gang" else "job"


def asked(spec: JobSpec, manifests: str) -> dict[str, str]:
    """The values that a job is submitted with, by configuration key.

    Args:
        manifests: digest of the rendered manifests, which stands for everything that no key sets.
    """
    cluster, room = spec.cluster, spec.room
    counts: dict[str, Any] = {"gang": {"nodes": spec.count}, "array": {"shares": spec.count}, "node": {}}[spec.shape]
    sizes = {"gpus": room.gpus, "cpus": room.cpus, "memory_gib": room.memory_gib, "shm_gib": cluster.shm_gib, "disk_gib": cluster.disk_gib}
    rest = {
        "overlay": cluster.overlay,
        "topology": cluster.topology,
        "queue": cluster.queue,
        "image": cluster.image,
        "grace_s": cluster.grace_s,
        "retries": cluster.retries,
    }
    values = {f"cluster.{name}": str(value) for name, value in (counts | sizes | rest).items()}
    return values | {"run folder": spec.run_url, "manifests": manifests}


def find(spec: JobSpec) -> Standing | None:
    """The job of the same name, if there is one.

    Raises:
        ConfigError: the cluster does not answer.
    """
    words = ["get", kind(spec), spec.name, f"--namespace={spec.cluster.namespace}", "--ignore-not-found", "--output=json", kubectl.PATIENCE]
    text = kubectl.run(words)
    if not text.strip():
        return None
    found = json.loads(text)
    ends = [_ENDS[each["type"]] for each in found.get("status", {}).get("conditions", []) if each["status"] == "True" and each["type"] in _ENDS]
    state: Any = ends[0] if ends else "live"
    return Standing(kind(spec), spec.name, state, json.loads(found["metadata"].get("annotations", {}).get(ASKED, "{}")))


def differences(standing: Standing, wanted: dict[str, str]) -> list[str]:
    """One line for each value that differs between the job in the cluster and the new submission."""
    if not standing.asked:
        return ["it was not submitted by launcher.py, so with what is unknown"]
    lines = [
        f"{key} = {standing.asked.get(key, 'unset')}, now {wanted.get(key, 'unset')}"
        for key in sorted(standing.asked.keys() | wanted.keys())
        if standing.asked.get(key) != wanted.get(key) and key != "manifests"
    ]
    if not lines and standing.asked["manifests"] != wanted["manifests"]:
        lines = [f"the files of overlay {wanted['cluster.overlay']} (or of its base or site) have changed"]
    return lines


def intent(spec: JobSpec, standing: Standing | None, wanted: dict[str, str]) -> str:
    """What a submission will do, in words; begins with ``submit``, ``replace``, ``leave`` or ``refuse``."""
    if standing is None:
        return "submit: there is no job of this name"
    where = f"{standing.kind} {standing.name} in namespace {spec.cluster.namespace}"
    if standing.state != "live":
        return f"replace: {where} has {standing.state}; it is deleted first, the run folder stays as it is"
    different = differences(standing, wanted)
    if different:
        return (
            f"refuse: {where} is there already, and not ended: {'; '.join(different)}. Give the values that it has, or delete it first (it saves): "
            f"kubectl delete {standing.kind} {standing.name} -n {spec.cluster.namespace}"
        )
    return f"leave: {where} is there already with the same values, and not ended"


def remove(spec: JobSpec, standing: Standing) -> None:
    """Delete an ended job and wait until its pods are gone, because a new job of that name would otherwise run beside them.

    Raises:
        ConfigError: the pods stay, for example because their node is gone.
    """
    words = ["delete", standing.kind, standing.name, f"--namespace={spec.cluster.namespace}", "--ignore-not-found", "--cascade=foreground"]
    try:
        kubectl.run([*words, "--wait=true", f"--timeout={WAIT_S}s"])
    except ConfigError as error:
        raise ConfigError(f"{error} A pod that is not removed is on a node that does not answer: docs/cluster.md, 'My node died'.") from error
