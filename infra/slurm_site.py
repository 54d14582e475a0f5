"""A site's settings for SLURM: the file that jobs and submissions read, and what it adds to a submission. No torch."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from infra import environment
from infra.errors import ConfigError
from infra.repository import REPOSITORY

_OWN = REPOSITORY / "infra" / "slurm" / "site.env"
_PATIENCE_S = 60.0


def path() -> Path:
    """The file: LAUNCHER_SITE (a site's own, outside the repository), or infra/slurm/site.env.

    Raises:
        ConfigError: LAUNCHER_SITE names no file.
    """
    given = environment.text("LAUNCHER_SITE")
    if given and not Path(given).is_file():
        raise ConfigError(f"LAUNCHER_SITE = {given}: there is no such file; name a copy of infra/slurm/site.env, or unset it.")
    return Path(given).absolute() if given else _OWN


def command(*words: str) -> list[str]:
    """A command that runs with the file's settings."""
    return ["bash", "-c", 'set -a; . "$0"; set +a; exec "$@"', str(path()), *words]


def value(name: str) -> str:
    """A variable, as the file and the environment leave it; '' where it is not set."""
    asked = command("bash", "-c", f'printf "%s\\n" "${{{name}:-}}"')
    done = subprocess.run(asked, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    return (done.stdout.splitlines() or [""])[-1].strip()  # the last line: a file that loads modules may print


def words(gpus: int) -> list[str]:
    """Options that the site gives to sbatch: LAUNCHER_SBATCH for every job, then LAUNCHER_SBATCH_GPU or LAUNCHER_SBATCH_CPU by whether the job asks for GPUs.

    Raises:
        ConfigError: a quote in one of them is not closed.
    """
    found = []
    for name in ("LAUNCHER_SBATCH", "LAUNCHER_SBATCH_GPU" if gpus else "LAUNCHER_SBATCH_CPU"):
        try:
            found += shlex.split(value(name))
        except ValueError as error:
            raise ConfigError(
                f"{name} = {value(name)}: {error}; accepted are options of sbatch, as in a shell ({path()}, or the environment)."
            ) from error
    return found


def variables() -> dict[str, str]:
    """What a job must know to read the same file; nothing where it is the repository's."""
    return {"LAUNCHER_SITE": str(path())} if environment.text("LAUNCHER_SITE") else {}
