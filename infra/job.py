"""Jobs on a cluster: what to ask a scheduler for, and which node of a job this launcher is. No torch."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, Field, field_validator

from infra import environment
from infra.config import Section
from infra.config_keys import ANY_TIME
from infra.errors import ConfigError

FIRST_PORT, PORTS = 20_000, 10_000
"""Rendezvous ports: FIRST_PORT plus the job id modulo PORTS, which stays below Linux's ephemeral ports (32768)."""
RETRIES = 3
"""Default number of consecutive crashes without progress that are retried."""
_PINNED = re.compile(r"^$|^[a-z0-9][A-Za-z0-9._/:-]*@sha256:[0-9a-f]{64}$")
_NO_STEP = 0xFFFFFF00
"""Step ids from here on are SLURM's own (batch, interactive, external); such a step was not started by srun."""
NAMESPACE = r"^$|^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""Name of a namespace of Kubernetes; empty: the one of kubectl's context."""


class ClusterConfig(Section):
    """What ``--on slurm`` and ``--on k8s`` ask for. Not part of a run's identity: a run may continue with other values. Site settings are in infra/slurm/site.env."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    nodes: int = Field(default=1, gt=0)
    """Nodes of a training stage; each runs one launcher."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of each node of a training stage; 0 trains on CPUs. If it is not 0, each share of encode and generate, and evaluate, asks for one GPU; prepare,
    tokenizer and report ask for none."""
    cpus: int = Field(default=8, gt=0)
    """CPU cores of each node of a training stage."""
    memory_gib: int = Field(default=32, gt=0)
    """Memory of each node of a training stage."""
    share_cpus: int = Field(default=0, ge=0)
    """CPU cores of each share of the other stages; 0: a node's cores divided by its GPUs."""
    share_memory_gib: int = Field(default=0, ge=0)
    """Memory of each share of the other stages; 0: a node's memory divided by its GPUs."""
    disk_gib: int = Field(default=0, ge=0)
    """Local disk of a pod (/tmp: caches of shards, exports); a pod that uses more is evicted. 0: what the overlay says. docs/cluster.md has a formula."""
    shm_gib: int = Field(default=8, gt=0)
    """Size of /dev/shm in a pod; it counts towards the pod's memory."""
    hours: float = Field(default=24, gt=0)
    """Time limit of a SLURM job; fractions such as 0.5 are accepted. The job saves and requeues itself before the limit. Must be longer than grace_s."""
    grace_s: int = Field(default=720, ge=660)
    """Seconds between the stop signal and the kill: longer than a step and a save, and longer than the 600 s that launchers give their ranks."""
    shares: int = Field(default=4, gt=0)
    """Array tasks (SLURM) or pods (Kubernetes) of a stage whose work is divided."""
    retries: int = Field(default=RETRIES, ge=0)
    """Consecutive crashes without progress that are retried before a job is given up."""
    kept_apart: bool = False
    """Declares that the scheduler never runs two launchers of one stage at once. Set it only for S3 servers that lack conditional
    writes (If-None-Match): elsewhere these writes keep launchers apart."""
    overlay: str = "cpu"
    """The kustomize overlay that the job is built on: a name below infra/k8s/overlays (cpu, gpu, kueue, kueue-topology), or any folder with a
    kustomization.yaml on top of one of them, such as infra/k8s/sites/aws."""
    topology: str = Field(default="", pattern=r"^$|^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
    """Node label whose value all nodes of a training job should share, where Kueue places the job: a level of the Topology that the queue's flavor names. Empty:
    what the overlay says."""
    queue: str = Field(default="", pattern=r"^$|^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")
    """Kueue's LocalQueue for the job, in its namespace; the job is then submitted suspended, on any overlay. Empty: what the overlay says ('train' in kueue and
    kueue-topology, none in the others)."""
    tensorboard: bool = False
    """Start TensorBoard beside a stage on Kubernetes, on the run's folder."""
    image: str = Field(default="", json_schema_extra={"pattern": _PINNED.pattern})
    """Container image, pinned by digest: registry/name@sha256:...; Kubernetes needs one."""
    namespace: str = Field(default="", pattern=NAMESPACE)
    """Namespace on Kubernetes. Empty: that of the overlay or its site, else 'default'."""

    @field_validator("image")
    @classmethod
    def _pinned(cls, image: str) -> str:
        if image and not _PINNED.fullmatch(image):
            raise ValueError(
                f"'{image}' is not pinned by its digest, so pods of one run could differ; accepted is registry/name@sha256:<64 hex digits>, which "
                "docker push prints, and docker buildx imagetools inspect registry/name:tag."
            )
        return image


@dataclass(frozen=True)
class Job:
    """This launcher's place in a scheduler's job; without a scheduler, the only node of a job without a name."""

    id: str = ""
    """Equal on all nodes and over restarts; empty outside a scheduler."""
    restart: int = 0
    """Restarts of this job so far."""
    node: int = 0
    nodes: int = 1
    rendezvous: str = ""
    """host:port of node 0."""
    address: str = ""
    """Name under which the others reach this node."""

    @property
    def run_id(self) -> str:
        """The same on all nodes of one start of the job. A scheduler may reuse it (suspend and resume), so each start also has an id of its own; see
        ``infra/meeting.py``."""
        return f"{self.id}.{self.restart}" if self.id else ""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Job:
        """Read LAUNCHER_JOB, _RESTART, _NODE, _NODES, _RENDEZVOUS and _ADDRESS (set in pods), or the variables that srun gives its tasks.

        Raises:
            ConfigError: the variables are incomplete, or srun started several tasks on a node.
        """
        if environment.text("LAUNCHER_JOB", env=env):
            job = _declared(env)
        elif _is_step(environment.text("SLURM_STEP_ID", env=env)):
            job = _slurm_task(env)
        else:
            return cls()
        if not 0 <= job.node < job.nodes:
            raise ConfigError(f"this is node {job.node} of {job.nodes}: nodes count from 0.")
        if job.nodes > 1 and not job.rendezvous:
            raise ConfigError(f"LAUNCHER_NODES = {job.nodes} needs LAUNCHER_RENDEZVOUS = host:port of node 0.")
        return job


def _is_step(step: str) -> bool:
    return step.isdigit() and int(step) < _NO_STEP


def _declared(env: Mapping[str, str]) -> Job:
    restart, node = (environment.whole(f"LAUNCHER_{name}", 0, env=env) for name in ("RESTART", "NODE"))
    nodes = environment.whole("LAUNCHER_NODES", 1, least=1, env=env)
    job, rendezvous, address = (environment.text(f"LAUNCHER_{name}", env=env) for name in ("JOB", "RENDEZVOUS", "ADDRESS"))
    return Job(job, restart, node, nodes, rendezvous, address)


def _slurm_task(env: Mapping[str, str]) -> Job:
    try:
        nodes, tasks, node, number = (
            environment.whole(f"SLURM_{name}", env=env) for name in ("STEP_NUM_NODES", "STEP_NUM_TASKS", "NODEID", "JOB_ID")
        )
        job, hosts = str(number), expand_hosts(environment.text("SLURM_STEP_NODELIST", env=env))
        restart = environment.whole("SLURM_RESTART_COUNT", 0, env=env)
    except ConfigError as error:
        raise ConfigError(f"inside srun, but {error} Start launchers as infra/slurm/*.sbatch do.") from error
    if tasks != nodes:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes: one launcher for each node starts the ranks itself; use --ntasks-per-node=1."
        )
    return Job(job, restart, node, nodes, f"{hosts[0]}:{port(job)}", environment.text("SLURMD_NODENAME", env=env))


def port(job: str) -> int:
    """Rendezvous port of a job, derived from its id, so that two jobs on one node rarely get the same one."""
    return FIRST_PORT + int(job) % PORTS


def expand_hosts(text: str) -> list[str]:
    """``"n[1-3,07],gpu"`` -> its names, in SLURM's order (``scontrol show hostnames`` without scontrol).

    Raises:
        ConfigError: the text is not a host list.
    """
    hosts: list[str] = []
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        hosts += _expand(word, text)
    if text.count("[") != text.count("]"):
        raise ConfigError(f"'{text}' is not a host list such as node[01-04,07].")
    if not hosts:
        raise ConfigError(f"'{text}' names no host.")
    return hosts


def _expand(word: str, text: str) -> list[str]:
    head, bracket, rest = word.partition("[")
    if not bracket:
        return [word]
    inside, _, tail = rest.partition("]")
    names = []
    for part in inside.split(","):
        low, dash, high = part.partition("-")
        if not low.isdigit() or (dash and not high.isdigit()):
            raise ConfigError(f"'{text}' is not a host list such as node[01-04,07].")
        names += [f"{head}{number:0{len(low)}d}" for number in range(int(low), int(high or low) + 1)]
    return [name + rest for name in names for rest in _expand(tail, text)] if tail else names


Shape = Literal["gang", "array", "node"]
Gpus = Literal["node", "one", "none"]
"""Which GPUs a stage asks for on a cluster with GPUs: all GPUs of each node, one for each share, or none."""


@dataclass(frozen=True)
class Room:
    """What each launcher of a job asks a scheduler for."""

    cpus: int
    memory_gib: int
    gpus: int


@dataclass(frozen=True)
class JobSpec:
    """One stage of one run, as a job."""

    stage: str
    run_name: str
    run_url: str
    shape: Shape
    """gang: one launcher on each of cluster.nodes, which fail and restart together; array: cluster.shares independent launchers; node: a single launcher."""
    cluster: ClusterConfig
    gpus: Gpus = "node"

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: the run folder's path holds control characters, which job files, manifests and their annotations may not carry.
        """
        if re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", self.run_url):
            raise ConfigError(f"run folder {self.run_url!r}: its path holds a control character; --on slurm and --on k8s accept none: rename it.")

    @property
    def count(self) -> int:
        """Launchers of the job."""
        return {"gang": self.cluster.nodes, "array": self.cluster.shares, "node": 1}[self.shape]

    @property
    def room(self) -> Room:
        """What each launcher asks for: in a gang, a whole node; otherwise a part of one."""
        whole = self.cluster
        if self.shape == "gang":
            return Room(whole.cpus, whole.memory_gib, whole.gpus)
        parts = max(1, whole.gpus)
        gpus = {"node": whole.gpus, "one": min(1, whole.gpus), "none": 0}[self.gpus]
        return Room(whole.share_cpus or max(1, whole.cpus // parts), whole.share_memory_gib or max(1, whole.memory_gib // parts), gpus)

    @property
    def name(self) -> str:
        """Name of the job: the same for the same stage of the same run folder, different for any other, and valid in DNS."""
        digest = hashlib.sha256(self.run_url.encode()).hexdigest()[:6]
        run = re.sub(r"[^a-z0-9]+", "-", self.run_name.lower()).strip("-")[:24].strip("-")
        return f"{run or 'run'}-{digest}-{self.stage}"
