"""Kubernetes: the manifests in infra/k8s/ filled in by a small overlay, rendered and applied by kubectl. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from infra import k8s_checks, k8s_standing, kubectl, scratch, storage
from infra.errors import ConfigError
from infra.job import JobSpec
from infra.repository import REPOSITORY

OVERLAYS = REPOSITORY / "infra" / "k8s" / "overlays"
SITE = REPOSITORY / "infra" / "k8s" / "site" / "kustomization.yaml"
NAMES = REPOSITORY / "infra" / "k8s" / "base" / "kustomizeconfig.yaml"
IMAGE = "text-to-image-launcher"
"""The image's name in the base."""
TOPOLOGY = "kueue.x-k8s.io/podset-preferred-topology"
"""Annotation of a gang's pods: the node label whose value they should share. Kueue never admits a gang that names a level its queue's flavor does not have."""
NAMESPACE = "default"
"""Where jobs go if neither cluster.namespace nor the overlay names a namespace."""
_BY_HAND = "trainjob"
"""The overlay whose objects are others than those that are filled in here."""
_RESTRICTIONS = "--load-restrictor=LoadRestrictionsNone"
_CONTAINER = "/spec/template/spec/containers/0"
_GANG = "/spec/replicatedJobs/0/template"
_DIGEST = "digest-of-the-manifests"
"""Placeholder in the annotation until the manifests are rendered and their digest is known."""


def base(name: str) -> Path:
    """The folder that a job is built on: a name below OVERLAYS, or the path of any other folder.

    Raises:
        ConfigError: there is no such folder, it holds no kustomization.yaml, or it is a part of others, with no jobs in it.
    """
    place = OVERLAYS / name if "/" not in name and (OVERLAYS / name).is_dir() else Path(name).expanduser()
    for found in (place, REPOSITORY / place):
        if (found / "kustomization.yaml").is_file():
            if re.search(r"^kind: Component$", (found / "kustomization.yaml").read_text(), re.M):
                raise ConfigError(f"cluster.overlay = {name}: a Component, which is a part of others; name the folder whose 'components' lists it.")
            return found.resolve()
    known = ", ".join(sorted(path.name for path in OVERLAYS.iterdir() if path.name != _BY_HAND))
    raise ConfigError(f"cluster.overlay = {name}: neither one of {known} nor a folder with a kustomization.yaml.")


def settled(spec: JobSpec) -> JobSpec:
    """The job with its namespace: cluster.namespace, else that of the overlay or its site, else ``NAMESPACE``."""
    if spec.cluster.namespace:
        return spec
    place, found = base(spec.cluster.overlay), None
    if place.parent != OVERLAYS or re.search(r"^namespace:", SITE.read_text(), re.M):  # the overlays beside these name none
        found = re.search(r"^  namespace: (\S+)$", _own(spec, kubectl.run(["kustomize", _RESTRICTIONS, str(place)])), re.M)
    return replace(spec, cluster=spec.cluster.model_copy(update={"namespace": found[1] if found else NAMESPACE}))


def overlay(spec: JobSpec) -> dict[str, Any]:
    """A kustomization on top of the chosen overlay: names, image, namespace, run folder, size. JSON, which is YAML too.

    Raises:
        ConfigError: no image, no such overlay, or a run folder that pods cannot reach.
    """
    cluster = spec.cluster
    if not cluster.image:
        raise ConfigError("--on k8s needs cluster.image=registry/name@sha256:...: pods must not change under a run.")
    if not storage.is_remote(spec.run_url):
        raise ConfigError(f"run folder {spec.run_url}: pods share no disk; set run.root=s3://bucket/runs.")
    base(cluster.overlay)
    name, digest = cluster.image.split("@")
    prefix = spec.name.removesuffix(spec.stage)
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["base"],
        "namespace": cluster.namespace,
        "namePrefix": prefix,
        "labels": [{"pairs": {"run": prefix.strip("-")}, "includeSelectors": True}],
        "configurations": [NAMES.name],
        "images": [{"name": IMAGE, "newName": name, "digest": digest}],
        "configMapGenerator": [
            {"name": "launcher", "behavior": "merge", "literals": [f"LAUNCHER_RUN={spec.run_url}", f"LAUNCHER_RETRIES={cluster.retries}"]}
        ],
        "patches": [{"target": {"kind": "JobSet" if spec.shape == "gang" else "Job", "name": spec.stage}, "patch": json.dumps(_patch(spec))}],
    }


def _patch(spec: JobSpec) -> list[dict[str, Any]]:
    """JSON patch for the size of the job: nodes or shares, and the resources of each (requests = limits, so that no neighbour can use them). What no key sets
    stays as the overlay has it."""
    cluster, count = spec.cluster, spec.count
    gang = spec.shape == "gang"
    top, variable = (_GANG, "LAUNCHER_NODES") if gang else ("", "JOB_COMPLETIONS")
    pod = f"{top}/spec/template"
    asked = json.dumps(k8s_standing.asked(spec, _DIGEST), sort_keys=True)
    steps: list[dict[str, Any]] = [
        {"op": "add", "path": f"/metadata/annotations/{_escaped(k8s_standing.ASKED)}", "value": asked},
        {"op": "replace", "path": f"{top}/spec/completions", "value": count},
        {"op": "replace", "path": f"{top}/spec/parallelism", "value": count},
        {"op": "replace", "path": f"{pod}/spec/terminationGracePeriodSeconds", "value": cluster.grace_s},
        {"op": "replace", "path": f"{pod}/spec/volumes/0/emptyDir/sizeLimit", "value": f"{cluster.shm_gib}Gi"},
        # The container's first variable, see infra/k8s/base/*/job*.yaml: the number of peers must equal the number of pods.
        {"op": "replace", "path": f"{top}{_CONTAINER}/env/0", "value": {"name": variable, "value": str(count)}},
        *_room(spec, f"{top}{_CONTAINER}/resources"),
    ]
    if cluster.disk_gib:
        steps.append({"op": "replace", "path": f"{pod}/spec/volumes/1/emptyDir/sizeLimit", "value": f"{cluster.disk_gib}Gi"})
    if gang and cluster.topology:
        steps.append({"op": "add", "path": f"{pod}/metadata/annotations/{_escaped(TOPOLOGY)}", "value": cluster.topology})
    if cluster.queue:
        label = f"/metadata/labels/{_escaped(k8s_checks.QUEUE)}"
        steps += [{"op": "add", "path": label, "value": cluster.queue}, {"op": "add", "path": "/spec/suspend", "value": True}]
    if not gang:  # one share that always fails does not stop the others; if a quarter fail, the shares are not to blame
        steps.append({"op": "replace", "path": "/spec/maxFailedIndexes", "value": max(1, count // 4)})
    return steps


def _room(spec: JobSpec, resources: str) -> list[dict[str, Any]]:
    """Requests and limits, added to those of the site (network cards, huge pages)."""
    room = spec.room
    steps: list[dict[str, Any]] = []
    asked = {"cpu": str(room.cpus), "memory": f"{room.memory_gib}Gi", "nvidia.com/gpu": str(room.gpus)}
    asked |= {"ephemeral-storage": f"{spec.cluster.disk_gib}Gi"} if spec.cluster.disk_gib else {}
    for part in ("requests", "limits"):
        steps += [{"op": "add", "path": f"{resources}/{part}/{_escaped(name)}", "value": value} for name, value in asked.items()]
        if not room.gpus:  # "remove" fails on a missing key; the "add" above makes sure that it exists
            steps.append({"op": "remove", "path": f"{resources}/{part}/{_escaped('nvidia.com/gpu')}"})
    return steps


def _escaped(name: str) -> str:
    """A key, escaped for a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


@contextlib.contextmanager
def folder(spec: JobSpec) -> Iterator[Path]:
    """A temporary folder for ``kubectl kustomize``: our overlay, and beside it a link to the chosen one (kustomize refuses absolute paths)."""
    with scratch.folder("k8s-") as room:
        place = Path(room, "overlay")
        place.mkdir()
        shutil.copy(NAMES, place)
        (place / "base").symlink_to(base(spec.cluster.overlay), target_is_directory=True)
        (place / "kustomization.yaml").write_text(json.dumps(overlay(spec), indent=2) + "\n")
        yield place


def render(spec: JobSpec) -> str:
    """All manifests of the overlay: those of this stage and those shared by all stages.

    Raises:
        ConfigError: kubectl is not installed, the overlay does not build, or it has no job of the stage to fill in.
    """
    with folder(settled(spec)) as place:
        text = kubectl.run(["kustomize", _RESTRICTIONS, str(place)])
    if not _own(spec, text):
        raise ConfigError(
            f"cluster.overlay = {spec.cluster.overlay}: it has no {'JobSet' if spec.shape == 'gang' else 'Job'} of the stage {spec.stage} that --on k8s could "
            "fill in. Take an overlay that has one, or apply this one by hand (docs/cluster.md, 'Kubernetes')."
        )
    return text.replace(_DIGEST, digest(spec, text))


def digest(spec: JobSpec, rendered: str) -> str:
    """Digest of the manifests that a submission applies, without the annotation that holds this digest: it shows whether their files have changed since."""
    own = [document for document in rendered.split("\n---\n") if re.search(rf"^    stage: ({spec.stage}|shared)$", document, re.M)]
    lines = [line for line in "\n".join(own).splitlines() if k8s_standing.ASKED not in line]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _own(spec: JobSpec, rendered: str) -> str:
    """The document of the stage's job in rendered manifests; '' if there is none."""
    found = (document for document in rendered.split("\n---\n") if re.search(r"^kind: Job(Set)?$", document, re.M))
    return next((document for document in found if re.search(rf"^    stage: {spec.stage}$", document, re.M)), "")


def selection(spec: JobSpec) -> str:
    """Label selector of a stage's objects: the job, its service account and its settings."""
    return f"stage in ({spec.stage},shared{',tensorboard' if spec.cluster.tensorboard else ''})"


def shown(spec: JobSpec) -> str:
    """For ``--dry-run``: what a submission would do now, the overlay, the command, and the rendered manifests."""
    spec = settled(spec)
    rendered = render(spec)
    try:
        intent = k8s_standing.intent(spec, k8s_standing.find(spec), k8s_standing.asked(spec, digest(spec, rendered)))
    except ConfigError as error:
        intent = f"the cluster was not asked what is there already: {error}"
    said = "".join(f"# {line}\n" for line in [*intent.splitlines(), k8s_checks.unsaid_endpoint(spec, rendered)] if line)
    command = shlex.join(["kubectl", "apply", "-f", "-", "-l", selection(spec)])
    return f"{said}# overlay\n{json.dumps(overlay(spec), indent=2)}\n# {command}\n{rendered}"


def submit(spec: JobSpec) -> str:
    """Apply a stage's manifests. An ended job of the same name is replaced; a live one with the same values is left alone.

    Returns:
        What was done, in words.

    Raises:
        ConfigError: kubectl refuses, a live job of the same name has other values, or the cluster lacks the queue or the topology that the job asks for.
    """
    spec = settled(spec)
    rendered = render(spec)
    standing = k8s_standing.find(spec)
    intent = k8s_standing.intent(spec, standing, k8s_standing.asked(spec, digest(spec, rendered)))
    if intent.startswith("refuse"):
        raise ConfigError(intent.removeprefix("refuse: "))
    if intent.startswith("leave"):
        return f"{intent.removeprefix('leave: ')}: left alone\n"
    k8s_checks.require(spec, _own(spec, rendered))
    if line := k8s_checks.unsaid_endpoint(spec, rendered):
        print(line, file=sys.stderr, flush=True)
    if standing is not None:
        k8s_standing.remove(spec, standing)
    return kubectl.run(["apply", "-f", "-", "-l", selection(spec)], rendered)
