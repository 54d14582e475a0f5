"""Jobs that were submitted for a run's stages: how they stand, what they printed, and their end. No torch.

``jobs/<stage>.json`` in the run folder says which (``infra/slurm_submit.py``, ``train/run/cluster.py``); schedulers are asked where their commands are.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from infra import kubectl, run_records, slurm_site, stored
from infra.errors import ConfigError, LostPeerError
from infra.run_folder import RunFolder

_PATIENCE_S = 20.0
OVER = "has ended meanwhile"
_GONE = ("nvalid job id", "already completing or completed")
"""What scancel says of a job that squeue still showed a moment ago."""
_SELECTORS = {"jobset": "jobset.sigs.k8s.io/jobset-name", "job": "batch.kubernetes.io/job-name"}
"""Label by which the pods of a job are known."""


@dataclass(frozen=True)
class Submitted:
    """A job, as it was noted when it was submitted."""

    stage: str
    scheduler: str
    job: str
    at: float
    output: str = ""
    kind: str = ""
    namespace: str = "default"
    shares: int = 1
    name: str = ""
    """SLURM: its name, without which a job is known by its number alone."""

    @property
    def words(self) -> str:
        """For people."""
        return f"job {self.job}" if self.scheduler == "slurm" else f"{self.kind or 'job'} {self.job} in namespace {self.namespace}"


def of(run: RunFolder, stage: str) -> Submitted | None:
    """The newest job that was submitted for a stage, if any was."""
    found = stored.read_if_there(run.at("jobs", f"{stage}.json"), run_records.Submitted)
    if found is None:
        return None
    array = next((re.fullmatch(r"--array=0-(\d{1,9})", word) for word in found.get("asked", []) if word.startswith("--array=")), None)
    shares = int(array[1]) + 1 if array else int(found.get("shares", 1))
    namespace = found.get("namespace") or "default"
    return Submitted(
        stage,
        found["scheduler"],
        found["job"],
        found["submitted"],
        found.get("output", ""),
        found.get("kind", ""),
        namespace,
        shares,
        found.get("name", ""),
    )


def state(job: Submitted) -> str | None:
    """How a job stands in its queue, in the scheduler's own words, with what it waits for; '' if it is not there (any more), None where nobody can be asked."""
    if job.scheduler == "slurm":
        answer = _asked(slurm_site.command("squeue", "--noheader", f"--jobs={job.job}", *_named(job), "--format=%T %r"))
        if answer is None:
            return None
        code, text = answer
        return _spoken(text) if code == 0 else ""  # an unknown job is an error of squeue
    answer = _asked(
        ["kubectl", "get", job.kind or "job", job.job, f"--namespace={job.namespace}", "--ignore-not-found", "--output=json", kubectl.PATIENCE]
    )
    if answer is None or answer[0]:
        return None
    return _conditions(json.loads(answer[1])) if answer[1].strip() else ""


def _named(job: Submitted) -> list[str]:
    """An option of squeue and scancel. Numbers are a cluster's own: in a run that was moved from another one, they are somebody else's."""
    return [f"--name={job.name}"] if job.name else []


def _spoken(lines: str) -> str:
    """``PENDING Resources`` in each line -> ``PENDING: Resources``; of an array, each state once."""
    found = dict.fromkeys(line.strip() for line in lines.splitlines() if line.strip())
    words = []
    for line in found:
        name, _, reason = line.partition(" ")
        words.append(name if reason in ("", "None", "(null)") else f"{name}: {reason}")
    return ", ".join(words)


def _conditions(job: dict[str, Any]) -> str:
    """``kubectl get`` of a Job or JobSet -> its last true condition, else what is active."""
    status = job.get("status", {})
    true = [each for each in status.get("conditions", []) if each.get("status") == "True"]
    if true:
        reason = true[-1].get("reason") or true[-1].get("message") or ""
        return f"{true[-1]['type']}: {reason}" if reason else str(true[-1]["type"])
    ready = status.get("ready", sum(int(each.get("ready", 0)) for each in status.get("replicatedJobsStatus", [])))
    return "RUNNING" if ready else "PENDING: its pods are not ready"


def cancel(job: Submitted) -> str:
    """End a job, which saves first, or take it out of the queue; what was said of it.

    Raises:
        ConfigError: the scheduler's command is not here.
        LostPeerError: it refuses, or does not answer.
    """
    slurm = slurm_site.command("scancel", *_named(job), job.job)
    pods = ["kubectl", "delete", job.kind or "job", job.job, f"--namespace={job.namespace}", "--ignore-not-found", "--wait=false", kubectl.PATIENCE]
    try:
        return _done(slurm if job.scheduler == "slurm" else pods).strip()
    except LostPeerError as error:
        if any(words in str(error) for words in _GONE):
            return OVER
        raise


def output_file(job: Submitted, run_url: str, share: int = 0) -> str:
    """The file that holds a SLURM job's output, of one share of an array.

    Raises:
        ConfigError: nobody knows: it was submitted by hand, or by an earlier version.
    """
    if not job.output:
        raise ConfigError(f"{job.words} of '{job.stage}': where its output lies was not noted; see scontrol show job {job.job} (StdOut).")
    name = job.output.replace("%A", job.job).replace("%j", job.job).replace("%a", str(share)).replace("%%", "%")
    return name if name.startswith("/") else f"{run_url}/{name}"


def pods_log(job: Submitted, *, follow: bool) -> list[str]:
    """The command that shows what the pods of a job print."""
    words = ["kubectl", "logs", f"--namespace={job.namespace}", f"--selector={_SELECTORS[job.kind or 'job']}={job.job}"]
    return [*words, "--prefix", "--tail=-1", "--max-log-requests=1000", *(["--follow"] if follow else [])]


def _missing(command: list[str]) -> str:
    """The program that a command needs and that is not here; '' where it is."""
    name = _shown(command).partition(" ")[0]
    return "" if shutil.which(name) else name


def _asked(command: list[str]) -> tuple[int, str] | None:
    """Exit code and output of a question; None where there is nobody to ask, or no answer."""
    if _missing(command):
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode and "nvalid job id" not in done.stderr:
        return None
    return done.returncode, done.stdout


def _done(command: list[str]) -> str:
    if name := _missing(command):
        raise ConfigError(f"{name} is not installed here: cancel and logs of a job work where it was submitted (a login node).")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=3 * _PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise LostPeerError(f"{_shown(command)}: no answer within {3 * _PATIENCE_S:.0f} s.") from error
    if done.returncode:
        raise LostPeerError(f"{_shown(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _shown(command: list[str]) -> str:
    return " ".join(command[4 if command[0] == "bash" else 0 :])
