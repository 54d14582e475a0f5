"""``launcher.py doctor``: this node against named floors, in half a minute. Every job of a scheduler does the same before its rendezvous."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time

from infra import local, storage
from infra.errors import ReportedError
from infra.job import Job
from infra.local import Finding
from infra.progress import table
from infra.run_folder import REPOSITORY, RunFolder, producer

ALL_REDUCE_FLOOR_GBS = {"nccl": 20.0, "gloo": 0.05}
"""Bus bandwidth within a node: NVLink gives hundreds, PCIe about 20; loopback on two slow cores 0.3."""
_ALL_REDUCE_S = 25
_NODES_S = 20


class UnfitNode(ReportedError):
    """A check missed its floor: the scheduler may try another node."""


def main(preset: str, overrides: list[str]) -> None:
    """Print one row for each check.

    Raises:
        UnfitNode: a floor was missed; the node to exclude is named.
    """
    findings = [*machine(), all_reduce(), apex()]
    if preset:
        from train.config import load_run

        cfg = load_run(preset, overrides)
        run = RunFolder(storage.join(cfg.run.root, cfg.run.name))
        findings += local.run_storage(run.url) + lineage(run)
    job = Job.from_env()
    if preset and job.nodes > 1:
        findings.append(same_versions(run, job))
    table([{"check": f.check, "": "ok" if f.ok else "FAILED", "found": f.found, "floor": f.floor} for f in findings], title=local.node_name())
    _refuse(findings)


def preflight(run: RunFolder) -> None:
    """The checks of a job before its rendezvous; silent where all is well.

    Raises:
        UnfitNode: see ``main``.
    """
    job = Job.from_env()
    findings = machine() + local.run_storage(run.url)
    if len(_devices()) > 1:
        findings.append(all_reduce())
    if job.nodes > 1:
        findings.append(same_versions(run, job))
    _refuse(findings)


def machine() -> list[Finding]:
    """What concerns the node alone."""
    return local.memory_and_disk() + local.gpus()


def _refuse(findings: list[Finding]) -> None:
    failed = [f for f in findings if not f.ok]
    if failed:
        node = local.node_name()
        lines = [f"{f.check}: {f.found} (floor: {f.floor}); {f.advice}" for f in failed]
        raise UnfitNode(f"node {node} is unfit:\n  " + "\n  ".join(lines) + f"\n  to go on without it: {local.exclusion(node)}")


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [d for d in visible.split(",") if d] if visible else []


def all_reduce() -> Finding:
    """Bandwidth of an all-reduce between this node's GPUs, or between two processes on its CPUs; in processes of its own, which can be killed."""
    command = [sys.executable, "-m", "train.verbs.doctor_all_reduce"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ALL_REDUCE_S, cwd=REPOSITORY, check=False)
    except subprocess.TimeoutExpired:
        return Finding(
            "all-reduce", False, f"no end within {_ALL_REDUCE_S} s", "ends", "the GPUs cannot reach each other: check NVLink, and run nccl-tests"
        )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Finding("all-reduce", False, words, "ends", "see the message; on GPUs, set NCCL_DEBUG=INFO and run doctor again")
    found = json.loads(done.stdout.splitlines()[-1])
    floor = ALL_REDUCE_FLOOR_GBS[found["backend"]]
    words = f"{found['gb_per_s']:.2f} GB/s ({found['backend']}, {found['ranks']} ranks)"
    return Finding(
        "all-reduce", found["gb_per_s"] >= floor, words, f"{floor} GB/s", "a slow link or a busy node: compare nvidia-smi topo -m with its peers"
    )


def apex() -> Finding:
    """Whether NVIDIA's apex is there, and which of its parts can be constructed; in a process of its own, which loads torch. Nothing depends on it."""
    finding = local.apex()
    if not finding.found.startswith("present, "):
        return finding
    done = subprocess.run([sys.executable, "-m", "train.apex_parts"], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    words = (done.stdout.strip() or done.stderr.strip() or "no message").splitlines()[-1]
    parts = json.loads(words) if not done.returncode else {"apex": words}
    return Finding("apex", True, "; ".join(f"{name}: {found}" for name, found in parts.items()))


def lineage(run: RunFolder) -> list[Finding]:
    """Whether what finished stages read is what lies there now."""
    manifest = run.at("images", "train", "manifest.json")
    if not storage.exists(manifest):
        return []
    now = storage.read_json(manifest)["content_hash"]
    stale = [stage for stage in ("dvae", "clip") if ((run.done(stage) or {}).get("parents") or {}).get("images", now) != now]
    found = f"made from other images: {', '.join(stale)}" if stale else f"images {now[:12]}"
    return [Finding("lineage", not stale, found, "one set of images", "run these stages in a new run folder, or put the old images back")]


def same_versions(run: RunFolder, job: Job) -> Finding:
    """Whether node 0 runs the same code and libraries; every node writes what it has beside the run's exit records."""
    place = run.at("preflight", job.run_id)
    ours = json.dumps(producer(), sort_keys=True)
    storage.write_json(storage.join(place, f"node-{job.node}.json"), {"node": local.node_name(), "producer": producer()})
    deadline = time.monotonic() + _NODES_S
    first = storage.join(place, "node-0.json")
    while not storage.exists(first):
        if time.monotonic() > deadline:
            return Finding("versions", False, f"node 0 did not report within {_NODES_S} s", "reports", "see the log of node 0")
        time.sleep(0.5)
    theirs = storage.read_json(first)
    same = json.dumps(theirs["producer"], sort_keys=True) == ours
    found = hashlib.sha256(ours.encode()).hexdigest()[:12]
    return Finding(
        "versions", same, f"{found}, other than on {theirs['node']}" if not same else found, "equal", "install the same environment on all nodes"
    )
