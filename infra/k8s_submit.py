"""Kubernetes: the manifests in infra/k8s/ filled in by a small overlay, rendered and applied by kubectl. No torch."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra import scratch, storage
from infra.errors import ConfigError
from infra.job import JobSpec
from infra.repository import REPOSITORY

OVERLAYS = REPOSITORY / "infra" / "k8s" / "overlays"
NAMES = REPOSITORY / "infra" / "k8s" / "base" / "kustomizeconfig.yaml"
IMAGE = "text-to-image-launcher"
"""The image's name in the base."""
_CONTAINER = "/spec/template/spec/containers/0"
_GANG = "/spec/replicatedJobs/0/template"


def overlay(spec: JobSpec) -> dict[str, Any]:
    """A kustomization on top of the chosen overlay: names, image, namespace, run folder, size. JSON, which is YAML too.

    Raises:
        ConfigError: no image, or a run folder that pods cannot reach.
    """
    cluster = spec.cluster
    if not cluster.image:
        raise ConfigError("--on k8s needs cluster.image=registry/name@sha256:...: pods must not change under a run.")
    if not storage.is_remote(spec.run_url):
        raise ConfigError(f"run folder {spec.run_url}: pods share no disk; set run.root=s3://bucket/runs.")
    name, digest = cluster.image.split("@")
    prefix = spec.name.removesuffix(spec.stage)
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [f"base/{cluster.overlay}"],
        "namespace": cluster.namespace,
        "namePrefix": prefix,
        "labels": [{"pairs": {"run": prefix.strip("-")}, "includeSelectors": True}],
        "configurations": [NAMES.name],
        "images": [{"name": IMAGE, "newName": name, "digest": digest}],
        "configMapGenerator": [
            {"name": "launcher", "behavior": "merge", "literals": [f"LAUNCHER_RUN={spec.run_url}", f"LAUNCHER_RETRIES={cluster.retries}"]}
        ],
        "patches": [_patch(spec)],
    }


def _patch(spec: JobSpec) -> dict[str, Any]:
    """Size of the job: nodes or shares, and what each asks for (requests = limits: no neighbour can take it)."""
    cluster = spec.cluster
    gang = spec.shape == "gang"
    count = {"gang": cluster.nodes, "array": cluster.shares, "node": 1}[spec.shape]
    base, variable = (_GANG, "LAUNCHER_NODES") if gang else ("", "JOB_COMPLETIONS")
    room: dict[str, Any] = {"cpu": str(cluster.cpus), "memory": f"{cluster.memory_gib}Gi", "ephemeral-storage": "20Gi"}
    room |= {"nvidia.com/gpu": str(cluster.gpus)} if cluster.gpus else {}
    steps = [
        {"op": "replace", "path": f"{base}/spec/completions", "value": count},
        {"op": "replace", "path": f"{base}/spec/parallelism", "value": count},
        {"op": "replace", "path": f"{base}{_CONTAINER}/resources", "value": {"requests": room, "limits": room}},
        {"op": "replace", "path": f"{base}/spec/template/spec/terminationGracePeriodSeconds", "value": cluster.grace_s},
        {"op": "replace", "path": f"{base}/spec/template/spec/volumes/0/emptyDir/sizeLimit", "value": f"{cluster.shm_gib}Gi"},
        # The first variable of the container, see infra/k8s/base/*/job*.yaml: the number of peers must be that of the pods.
        {"op": "replace", "path": f"{base}{_CONTAINER}/env/0", "value": {"name": variable, "value": str(count)}},
    ]
    if not gang:  # one poisoned share does not stop the rest; where a quarter fail, it is not the share
        steps.append({"op": "replace", "path": "/spec/maxFailedIndexes", "value": max(1, count // 4)})
    return {"target": {"kind": "JobSet" if gang else "Job", "name": spec.stage}, "patch": json.dumps(steps)}


@contextlib.contextmanager
def folder(spec: JobSpec) -> Iterator[Path]:
    """A temporary folder that kubectl's -k reads: our overlay, and beside it a link to the repository's (kustomize refuses absolute paths)."""
    with scratch.folder("k8s-") as room:
        place = Path(room, "overlay")
        place.mkdir()
        shutil.copy(NAMES, place)
        (place / "base").symlink_to(OVERLAYS, target_is_directory=True)
        (place / "kustomization.yaml").write_text(json.dumps(overlay(spec), indent=2) + "\n")
        yield place


def render(spec: JobSpec) -> str:
    """All manifests of the overlay, this stage's and those it shares.

    Raises:
        ConfigError: kubectl is not here, or the overlay does not build.
    """
    with folder(spec) as place:
        return _kubectl(["kustomize", "--load-restrictor=LoadRestrictionsNone", str(place)])


def selection(spec: JobSpec) -> str:
    """Label selector of what belongs to a stage's job: itself, its account and its settings."""
    return f"stage in ({spec.stage},shared)"


def shown(spec: JobSpec) -> str:
    """The overlay, what it renders to, and the command."""
    command = shlex.join(["kubectl", "apply", "-f", "-", "-l", selection(spec)])
    return f"# overlay\n{json.dumps(overlay(spec), indent=2)}\n# {command}\n{render(spec)}"


def submit(spec: JobSpec) -> str:
    """Apply a stage's manifests; the same again changes nothing. Returns kubectl's words.

    Raises:
        ConfigError: kubectl refuses.
    """
    return _kubectl(["apply", "-f", "-", "-l", selection(spec)], render(spec))


def _kubectl(arguments: list[str], given: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("kubectl is not installed here: --on k8s renders and applies with it.") from error
    if done.returncode:
        raise ConfigError(f"kubectl {shlex.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
