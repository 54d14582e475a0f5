"""SLURM: submits the scripts in infra/slurm/, with options on sbatch's command line, and never the same job twice. No torch."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from infra import run_records, slurm_site, storage, stored
from infra.errors import ConfigError, LostPeerError
from infra.job import JobSpec
from infra.repository import REPOSITORY

_EXPORTED = ("PATH", "HOME", "USER", "LANG", "TMPDIR")
"""Variables that a job needs from the shell that submits it, besides our own and the storage's."""
_PASSED = ("LAUNCHER_", "S3_", "AWS_", "GOOGLE_", "AZURE_", "STORAGE_EMULATOR_HOST", "HTTP", "NO_PROXY", "http", "no_proxy", "SSL_CERT_")
_TEST_S = 30.0
_WAITS = ("--dependency=", "--kill-on-invalid-dep=")


@dataclass(frozen=True)
class Queued:
    """A job in the queue."""

    job: str
    state: str
    """As squeue prints it: PENDING, RUNNING ..., followed by the reason if the job waits."""


def sbatch(spec: JobSpec, after: Sequence[str] = ()) -> list[str]:
    """The sbatch command of a job; its options override the script's own ``#SBATCH`` lines, and the site's come after ours.

    Args:
        after: ids of jobs that must succeed before this one starts.

    Raises:
        ConfigError: the time limit leaves no time before the signal that ends the job, or the site's options are none.
    """
    cluster, room = spec.cluster, spec.room
    seconds = round(cluster.hours * 3600)
    if seconds <= cluster.grace_s:
        raise ConfigError(
            f"cluster.hours = {cluster.hours:g} ({seconds} s) is not longer than cluster.grace_s = {cluster.grace_s}: the job would be told to stop as it "
            f"starts, and start again for ever. Set cluster.hours above {cluster.grace_s / 3600:.2g}, or a smaller cluster.grace_s (from 660 on)."
        )
    words = ["sbatch", "--parsable", f"--job-name={spec.name}", f"--chdir={REPOSITORY}"]
    words += [f"--nodes={cluster.nodes if spec.shape == 'gang' else 1}", f"--cpus-per-task={room.cpus}", f"--mem={room.memory_gib}G"]
    words += [f"--gpus-per-node={room.gpus}"] if room.gpus else []
    if "\\" in str(logs(spec)):  # says to SLURM that %x and %j are no patterns, and that %% is two characters
        raise ConfigError(f"{logs(spec)}: SLURM accepts no backslash in the path of a job's output: rename the folder.")
    minutes, hours = seconds // 60, seconds // 3600
    words += [f"--time={hours}:{minutes % 60:02d}:{seconds % 60:02d}", f"--signal=USR2@{cluster.grace_s}"]
    words += [f"--array=0-{cluster.shares - 1}"] if spec.shape == "array" else []
    words += [f"--output={str(logs(spec)).replace('%', '%%')}/%x-{_numbers(spec)}.out"]
    words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return [*words, *slurm_site.words(room.gpus), str(REPOSITORY / "infra" / "slurm" / f"{spec.stage}.sbatch"), spec.run_url]


def _numbers(spec: JobSpec) -> str:
    """What tells the outputs of jobs and tasks apart, as SLURM writes it."""
    return "%A_%a" if spec.shape == "array" else "%j"


def output(spec: JobSpec) -> str:
    """The pattern of the job's output for its record: relative to the run folder where it lies in there, which may move."""
    folder = str(logs(spec)).replace("%", "%%") if storage.is_remote(spec.run_url) else "logs"
    return f"{folder}/{spec.name}-{_numbers(spec)}.out"


def logs(spec: JobSpec) -> Path:
    """Folder of the jobs' output: ``logs`` in the run folder; for a run on a remote storage, ``logs`` in the repository."""
    return REPOSITORY / "logs" if storage.is_remote(spec.run_url) else storage.local_path(spec.run_url) / "logs"


def environment(spec: JobSpec) -> dict[str, str]:
    """Environment variables that the job needs besides its arguments."""
    return {"LAUNCHER_HOME": str(REPOSITORY), "LAUNCHER_RETRIES": str(spec.cluster.retries)} | slurm_site.variables()


def shown(spec: JobSpec, after: Sequence[str] = ()) -> str:
    """For ``--dry-run``: the command as one would type it, the script that it submits, and, where SLURM is installed, the answer of ``sbatch --test-only``."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(spec).items())
    command = sbatch(spec, after)
    words = (
        f"set -a; . {shlex.quote(str(slurm_site.path()))}; set +a\n{settings} {shlex.join(command)}\n# {command[-2]}\n{Path(command[-2]).read_text()}"
    )
    return words + _tested(spec)


def _tested(spec: JobSpec) -> str:
    if shutil.which("sbatch") is None:
        return ""
    command = sbatch(spec)  # without dependencies: the jobs that it would wait for have no ids yet
    try:
        done = _site(["sbatch", "--test-only", *_exports(), *command[1:]], spec, _TEST_S)
    except subprocess.TimeoutExpired:
        return f"# sbatch --test-only: no answer within {_TEST_S:.0f} s\n"
    said = " ".join((done.stderr + done.stdout).split())
    return f"# sbatch --test-only: {said}" + (f" (refused: {done.returncode})\n" if done.returncode else "\n")


def queued(spec: JobSpec) -> Queued | None:
    """The queued or running job of this stage and run folder, if there is one.

    Raises:
        ConfigError: SLURM's commands are not installed.
        LostPeerError: the controller does not answer.
    """
    lines = _run(["squeue", "--noheader", "--me", f"--name={spec.name}", "--format=%F %T %r"], spec, LostPeerError).splitlines()
    words = next((line.split(maxsplit=2) for line in lines if line.strip()), None)
    if words is None:
        return None
    job, state, reason = (*words, "", "")[:3]
    return Queued(job, f"{state}: {reason}" if reason not in ("", "None", "(null)") else state)


def submit(spec: JobSpec, record_url: str, after: Sequence[str] = ()) -> tuple[str, str]:
    """Submit a job unless it is in the queue already, and store its id in the run folder.

    Args:
        record_url: the file that keeps the id and the options of the submission.
        after: ids of jobs that must succeed before this one starts.

    Returns:
        The job's id, and its state if it was in the queue already; '' if it was submitted now.

    Raises:
        ConfigError: sbatch is not installed or refuses, or the job in the queue was submitted with other options.
        LostPeerError: the controller does not answer.
    """
    command = sbatch(spec, after)
    asked = [word for word in command[1:] if not word.startswith(_WAITS)] + [f"{name}={value}" for name, value in environment(spec).items()]
    there = queued(spec)
    if there is not None:
        _refuse_other_values(spec, there, record_url, asked)
        return there.job, there.state or "queued"
    logs(spec).mkdir(parents=True, exist_ok=True)
    answer = _run([command[0], *_exports(), *command[1:]], spec, ConfigError)
    job = answer.strip().split(";")[0]  # a federation adds ;cluster
    facts = {"scheduler": "slurm", "job": job, "name": spec.name, "submitted": time.time(), "asked": asked, "output": output(spec)}
    storage.write_json(record_url, facts)
    return job, ""


def _refuse_other_values(spec: JobSpec, there: Queued, record_url: str, asked: list[str]) -> None:
    known = stored.read_if_there(record_url, run_records.Submitted)
    if known is None or known["job"] != there.job:
        return  # submitted by hand: its options are not known
    gone, new = ([word for word in one if word not in other] for one, other in ((known["asked"], asked), (asked, known["asked"])))
    if gone or new:
        raise ConfigError(
            f"{spec.stage}: job {there.job} is in the queue ({there.state}) and asks for {' '.join(gone) or 'less'}, not for {' '.join(new) or 'that'}: "
            f"cancel it first (scancel {there.job}; one that runs saves and ends), and submit again."
        )


def _exports() -> list[str]:
    """The --export option for sites that do not pass the login node's environment to jobs (SBATCH_EXPORT): it lists the variables that jobs need."""
    asked = slurm_site.value("SBATCH_EXPORT")
    if asked in ("", "ALL"):
        return []
    names = [name for name in sorted(os.environ) if name in _EXPORTED or name.startswith(_PASSED)]
    wanted = [] if asked in ("NONE", "NIL") else asked.split(",")
    return [f"--export={','.join(dict.fromkeys([*wanted, *names, 'LAUNCHER_HOME', 'LAUNCHER_RETRIES']))}"]


def _run(command: list[str], spec: JobSpec, error: type[ConfigError] | type[LostPeerError]) -> str:
    done = _site(command, spec)
    if done.returncode == 127:
        raise ConfigError(f"{command[0]} is not installed here: --on slurm works on a login node; --dry-run shows what it would do.")
    if done.returncode:
        raise error(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def _site(command: list[str], spec: JobSpec, limit_s: float | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        slurm_site.command(*command), capture_output=True, text=True, env=os.environ | environment(spec), timeout=limit_s, check=False
    )
