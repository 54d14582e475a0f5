"""The one reader of environment variables that others set: users, schedulers, containers.

An empty variable counts as not set. A value that makes no sense is refused, with the variable's name, and never guessed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from infra.errors import ConfigError

_NO_DEVICES = ("", "-1", "none", "void", "nodevfiles")
"""Values of CUDA_VISIBLE_DEVICES that mean no GPU; SLURM writes NoDevFiles. Unlike any other variable, this one has a meaning when it is empty."""
_OURS = ("LAUNCHER_", "SLURM_", "AWS_", "S3_", "OMP_", "TMPDIR", "HOME")
_LONGEST = 80  # characters of a value that a message shows


def text(name: str, default: str = "", env: Mapping[str, str] | None = None) -> str:
    """The value without surrounding white space; the default if it is empty or not set."""
    return (os.environ if env is None else env).get(name, "").strip() or default


def whole(name: str, default: int | None = None, *, least: int = 0, env: Mapping[str, str] | None = None) -> int:
    """A whole number of at least ``least``.

    Raises:
        ConfigError: the value is something else, or the variable is not set and there is no default.
    """
    given = text(name, env=env)
    if not given and default is not None:
        return default
    if not given:
        raise ConfigError(f"{name} is not set: a whole number of at least {least} is needed.")
    if not (given.isascii() and given.isdigit()) or int(given) < least:
        raise ConfigError(f"{name} = '{given[:_LONGEST]}': accepted is a whole number of at least {least}; unset or correct it.")
    return int(given)


def seconds(name: str, default: float, env: Mapping[str, str] | None = None) -> float:
    """A positive number of seconds.

    Raises:
        ConfigError: the value is something else.
    """
    given = text(name, env=env)
    try:
        found = float(given) if given else default
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):  # false for NaN, too
        raise ConfigError(f"{name} = '{given[:_LONGEST]}': accepted is a number of seconds above 0; unset or correct it.")
    return found


def threads(default: int, env: Mapping[str, str] | None = None) -> int:
    """OMP_NUM_THREADS. OpenMP also accepts a list (for nested regions), which has no meaning for ranks.

    Raises:
        ConfigError: it is not a single number.
    """
    return whole("OMP_NUM_THREADS", default, least=1, env=env)


def visible_devices(env: Mapping[str, str] | None = None) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES allows; None if it is not set. As in CUDA, the first invalid entry ends the list."""
    given = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return None
    found: list[str] = []
    for entry in (word.strip() for word in given.split(",")):
        if entry.lower() in _NO_DEVICES or not (entry.isdigit() or entry.startswith(("GPU-", "MIG-"))):
            break
        found.append(entry)
    return found


def home(env: Mapping[str, str] | None = None) -> Path | None:
    """The home folder, if there is one: a container may run under a uid without a user name, and without HOME."""
    given = text("HOME", env=env)
    if given:
        return Path(given)
    try:
        return Path.home()
    except RuntimeError:
        return None


def temporary() -> Path:
    """The folder for temporary files.

    Raises:
        ConfigError: TMPDIR names no writable folder (Python would silently take another one), or there is no such folder at all.
    """
    named = text("TMPDIR")
    if named and not os.access(named, os.W_OK | os.X_OK):
        raise ConfigError(f"TMPDIR = {named[:_LONGEST]}: not a folder that can be written to; create it, or unset TMPDIR.")
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no folder for temporary files ({error.strerror}); set TMPDIR to one that can be written.") from error


def check() -> None:
    """Refuse early, and in one place, the values that libraries would stumble over later; and set HOME and USER where a user has none.

    Raises:
        ConfigError: a variable has a value that makes no sense.
    """
    for name in [each for each, value in os.environ.items() if not value.strip() and each.startswith(_OURS)]:
        del os.environ[name]  # libraries do not treat empty as unset: boto3 looks for a profile with an empty name
    temporary()
    threads(1)
    if home() is None:
        os.environ["HOME"] = str(temporary())  # torch and boto3 look there for caches and settings, which may be absent
    if not any(text(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"  # torch names its cache of compiled code after it
