"""SLURM: the scripts in infra/slurm/ filled in on sbatch's command line, and submitted once. No torch."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from infra import storage
from infra.errors import ConfigError, LostPeerError
from infra.job import JobSpec
from infra.repository import REPOSITORY

SITE = REPOSITORY / "infra" / "slurm" / "site.env"


def sbatch(spec: JobSpec, after: Sequence[str] = ()) -> list[str]:
    """The sbatch command of a job; options here win over the script's own ``#SBATCH`` lines.

    Args:
        after: ids of jobs that must end well before it starts.
    """
    cluster, room = spec.cluster, spec.room
    words = ["sbatch", "--parsable", f"--job-name={spec.name}", f"--chdir={REPOSITORY}"]
    words += [f"--nodes={cluster.nodes if spec.shape == 'gang' else 1}", f"--cpus-per-task={room.cpus}", f"--mem={room.memory_gib}G"]
    words += [f"--gpus-per-node={room.gpus}"] if room.gpus else []
    words += [f"--time={cluster.hours}:00:00", f"--signal=USR2@{cluster.grace_s}"]
    words += [f"--array=0-{cluster.shares - 1}"] if spec.shape == "array" else []
    words += [f"--output={str(logs(spec)).replace('%', '%%')}/%x-{'%A_%a' if spec.shape == 'array' else '%j'}.out"]
    words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []
    return [*words, str(REPOSITORY / "infra" / "slurm" / f"{spec.stage}.sbatch"), spec.run_url]


def logs(spec: JobSpec) -> Path:
    """Folder of the jobs' output: in the run folder, or below the repository for a run on s3."""
    return REPOSITORY / "logs" if storage.is_remote(spec.run_url) else storage.local_path(spec.run_url).resolve() / "logs"


def environment(spec: JobSpec) -> dict[str, str]:
    """What the job needs besides its arguments."""
    return {"LAUNCHER_HOME": str(REPOSITORY), "LAUNCHER_RETRIES": str(spec.cluster.retries)}


def shown(spec: JobSpec, after: Sequence[str] = ()) -> str:
    """The command as one would type it, and the script that it submits."""
    settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment(spec).items())
    command = sbatch(spec, after)
    return f"set -a; . {shlex.quote(str(SITE))}; set +a\n{settings} {shlex.join(command)}\n# {command[-2]}\n{Path(command[-2]).read_text()}"


def submit(spec: JobSpec, after: Sequence[str] = ()) -> tuple[str, bool]:
    """Submit a job unless it is in the queue already.

    Returns:
        Its id, and whether it was submitted now.

    Raises:
        ConfigError: sbatch is not here or refuses.
        LostPeerError: the controller does not answer.
    """
    queued = _run(["squeue", "--noheader", "--me", f"--name={spec.name}", "--format=%F"], spec, LostPeerError).split()
    if queued:
        return queued[0], False
    logs(spec).mkdir(parents=True, exist_ok=True)
    answer = _run(sbatch(spec, after), spec, ConfigError)
    return answer.strip().split(";")[0], True  # a federation adds ;cluster


def _run(command: list[str], spec: JobSpec, error: type[ConfigError] | type[LostPeerError]) -> str:
    site = ["bash", "-c", 'set -a; . "$0"; set +a; exec "$@"', str(SITE), *command]
    done = subprocess.run(site, capture_output=True, text=True, env=os.environ | environment(spec), check=False)
    if done.returncode == 127:
        raise ConfigError(f"{command[0]} is not installed here: --on slurm works on a login node; --dry-run shows what it would do.")
    if done.returncode:
        raise error(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
