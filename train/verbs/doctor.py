"""``launcher.py doctor``: checks in half a minute whether this node reaches minimum values. Every job of a scheduler does the same before its rendezvous."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from infra import environment, node_checks, storage, stored
from infra.config import differences
from infra.errors import DataError, ReportedError
from infra.job import Job
from infra.meeting import RENDEZVOUS_S
from infra.node_checks import Finding
from infra.progress import table
from infra.repository import REPOSITORY
from infra.run_folder import RunFolder, producer
from infra.run_records import NodeVersions
from infra.text import counted

if TYPE_CHECKING:
    from train.config import RunConfig

Check = Callable[[], list[Finding]]
ALL_REDUCE_FLOOR_GBS = {"nccl": 20.0, "gloo": 0.05}
"""Minimum bus bandwidth within a node. NVLink reaches hundreds, PCIe about 20, the loopback device on two slow cores 0.3."""
LIMIT_S = 29
"""Seconds that all checks together may take."""
_ALL_REDUCE_S = 25
_LATE = {"storage": "the endpoint does not answer: check the network and S3_ENDPOINT_URL", "machine": "the driver hangs: reboot the node"}


class UnfitNode(ReportedError):
    """A check failed: the scheduler may try another node."""


def main(preset: str, overrides: list[str]) -> None:
    """Print one row for each check.

    Raises:
        UnfitNode: a check failed; the message names the node to exclude.
        DataError: the node passed all checks, but inputs of the run do not belong together.
    """
    checks: dict[str, Check] = {
        "machine": machine,
        "all-reduce": lambda: [all_reduce()],
        "packages": lambda: [node_checks.packages()],
        "apex": lambda: [apex()],
        "host name": node_checks.host_name,
    }
    url = ""
    if preset:
        from train.config import load_run

        cfg, job = load_run(preset, overrides), Job.from_env()
        run = RunFolder(storage.join(cfg.run.root, cfg.run.name))
        url = run.url
        checks |= {"storage": lambda: node_checks.run_storage(run.url), "lineage": lambda: lineage(cfg, run)}
        checks["KillWait"] = lambda: node_checks.kill_wait(_saves(run))
        if job.nodes > 1:
            checks["versions"] = lambda: [same_versions(run, job)]
    findings = gathered(checks)
    table([{"check": f.check, "": "ok" if f.ok else "FAILED", "found": f.found, "floor": f.floor} for f in findings], title=node_checks.node_name())
    _refuse([finding for finding in findings if finding.check != "lineage"])
    for finding in findings:
        if not finding.ok:
            raise DataError(f"inputs of {url} do not belong together: {finding.found}; {finding.advice}.")


@contextmanager
def fit(run: RunFolder, job: Job) -> Iterator[None]:
    """For the block, this node is known to be fit for the job. At its end the versions that it has said are taken back: a job that is suspended and resumed
    has the id of before, and may have another image.

    Raises:
        UnfitNode: see ``main``.
    """
    preflight(run)
    try:
        yield
    finally:
        if job.nodes > 1:
            with suppress(ReportedError):  # they are too old for a later start soon
                storage.delete(_said_versions(run, job))


def preflight(run: RunFolder) -> None:
    """The checks of a job before its rendezvous. Prints nothing if all pass. Lineage is not checked here: stages do that themselves, and end with 65 if it is wrong.

    Raises:
        UnfitNode: see ``main``.
    """
    job = Job.from_env()
    checks: dict[str, Check] = {"machine": machine, "storage": lambda: node_checks.run_storage(run.url)}
    if len(_devices()) > 1:
        checks["all-reduce"] = lambda: [all_reduce()]
    if job.nodes > 1:
        checks["versions"] = lambda: [same_versions(run, job)]
    _refuse(gathered(checks))


def gathered(checks: dict[str, Check]) -> list[Finding]:
    """Run checks in parallel and return their findings. A check that does not answer within LIMIT_S, because a server is dead or a driver hangs, is a finding too."""
    answers: dict[str, list[Finding]] = {}
    failures: list[BaseException] = []

    def run_one(name: str, check: Check) -> None:
        try:
            answers[name] = check()
        except BaseException as error:
            failures.append(error)

    deadline = time.monotonic() + LIMIT_S
    threads = [threading.Thread(target=run_one, args=item, name=f"doctor {item[0]}", daemon=True) for item in checks.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    late = {name: [Finding(name, False, f"no answer within {LIMIT_S} s", "answers", _LATE.get(name, "see what hangs"))] for name in checks}
    return [finding for name in checks for finding in answers.get(name, late[name])]


def machine() -> list[Finding]:
    """The checks that concern only the node, not a run."""
    return node_checks.memory_and_disk() + node_checks.gpus()


def _refuse(findings: list[Finding]) -> None:
    failed = [f for f in findings if not f.ok]
    if failed:
        nodes = list(dict.fromkeys(node for f in failed for node in f.nodes or (node_checks.node_name(),)))
        lines = [f"{f.check}: {f.found} (floor: {f.floor}); {f.advice}" for f in failed]
        ways = [f"to go on without it: {node_checks.exclusion(node)}" for node in nodes]
        raise UnfitNode(f"node {', '.join(nodes)} is unfit:\n  " + "\n  ".join(lines + ways))


def _devices() -> list[str]:
    return environment.visible_devices() or []


def all_reduce() -> Finding:
    """Bandwidth of an all-reduce between this node's GPUs, or between two processes on its CPUs. Runs in separate processes, which can be killed."""
    command = [sys.executable, "-m", "train.verbs.doctor_all_reduce"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ALL_REDUCE_S, cwd=REPOSITORY, check=False)
    except subprocess.TimeoutExpired:
        reached = shutil.which("nvidia-smi") is not None
        advice = "the GPUs cannot reach each other: check NVLink, and run nccl-tests" if reached else "see what else works on this machine (uptime)"
        return Finding("all-reduce", False, f"no end within {_ALL_REDUCE_S} s", "ends", advice)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("all-reduce", False, words, "ends", "see the message; on GPUs, set NCCL_DEBUG=INFO and run doctor again")
    found = json.loads(done.stdout.splitlines()[-1])
    floor = ALL_REDUCE_FLOOR_GBS[found["backend"]]
    words = f"{found['gb_per_s']:.2f} GB/s ({found['backend']}, {counted(found['ranks'], 'rank')})"
    return Finding(
        "all-reduce", found["gb_per_s"] >= floor, words, f"{floor} GB/s", "a slow link or a busy node: compare nvidia-smi topo -m with its peers"
    )


def apex() -> Finding:
    """Whether NVIDIA's apex is installed, and which of its parts work. Runs in a separate process, because it loads torch. Only for information: it never fails."""
    finding = node_checks.apex()
    if not finding.found.startswith("present, "):
        return finding
    done = subprocess.run([sys.executable, "-m", "train.optimizer.apex_parts"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    words = (done.stdout.strip() or done.stderr.strip() or "no message").splitlines()[-1]
    parts = json.loads(words) if not done.returncode else {"apex": words}
    return Finding("apex", True, "; ".join(f"{name}: {found}" for name, found in parts.items()))


def _saves(run: RunFolder) -> dict[str, float]:
    """Stage -> seconds that its last save of a checkpoint took."""
    from train.loop.metrics import read_metrics
    from train.run.stage_table import TRAINED

    found = {stage: read_metrics(run.url, stage).get("perf/save_s", []) for stage in TRAINED}
    return {stage: points[-1].value for stage, points in found.items() if points}


def lineage(cfg: RunConfig, run: RunFolder) -> list[Finding]:
    """Whether every finished stage was made from the inputs that the run has now. No finding if no stage is finished."""
    from train.verbs.doctor_lineage import checked

    looked, wrong = checked(cfg, run)
    if not looked and not wrong:
        return []
    found = "; ".join(wrong) or f"{looked} parents of finished stages are there"
    return [Finding("lineage", not wrong, found, "one lineage", "put the old inputs back, or delete these stages' folders and run them again")]


def same_versions(run: RunFolder, job: Job) -> Finding:
    """Whether the nodes that have reached this check so far, this one included, run the same code and libraries. No node waits: of two that differ, the later one
    notices.

    Every node writes what it has below ``preflight/`` in the run folder, in a folder named by its digest: where all have the same, the names of the files say so,
    and none is read. Those that differ from most are the ones to leave out. What an earlier start of the job has left, whose id may be the same, is not counted.
    """
    place, own = run.at("preflight", job.run_id), _said_versions(run, job)
    storage.write_json(own, {"node": node_checks.node_name(), "producer": producer()})
    names = storage.list_files(place)
    if len(_by_digest(names)) > 1:
        written = storage.modified(own)
        names = [name for name in names if written - _modified(storage.join(place, name)) <= RENDEZVOUS_S + LIMIT_S]
    groups = _by_digest(names)
    usual = max(groups, key=lambda group: len(groups[group]))
    said = {group: [storage.join(place, name) for name in groups[group]] for group in groups}
    odd = [each for group in groups if group != usual for url in said[group] if (each := stored.read_if_there(url, NodeVersions)) is not None]
    like = next((each["producer"] for url in said[usual] if odd and (each := stored.read_if_there(url, NodeVersions)) is not None), None)
    if like is None:
        return Finding("versions", True, f"{usual} on {len(names)} of {job.nodes} nodes so far", "equal")
    words = "; ".join(f"{each['node']}: {', '.join(differences(like, each['producer']))}" for each in odd)
    return Finding(
        "versions",
        False,
        f"other than on most nodes: {words}",
        "equal",
        "install the same environment on all nodes",
        tuple(str(each["node"]) for each in odd),
    )


def _said_versions(run: RunFolder, job: Job) -> str:
    mine = json.dumps(producer(), sort_keys=True)
    return storage.join(run.at("preflight", job.run_id), hashlib.sha256(mine.encode()).hexdigest()[:12], f"node-{job.node:05d}.json")


def _modified(url: str) -> float:
    """When a node said its versions; long ago where it has taken them back meanwhile."""
    try:
        return storage.modified(url)
    except DataError:
        return 0.0


def _by_digest(names: list[str]) -> dict[str, list[str]]:
    """Files of nodes by what they say; among groups of one size the first node's comes first."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: name.rpartition("/")[2]):
        groups.setdefault(name.partition("/")[0], []).append(name)
    return groups
