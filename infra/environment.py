"""The one reader of variables that others set: users, schedulers, containers. An empty variable is one that is not set; what is odd is refused by name, never guessed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from infra.errors import ConfigError

_NO_DEVICES = ("", "-1", "none", "void", "nodevfiles")
"""What CUDA_VISIBLE_DEVICES says where there is no GPU; SLURM writes NoDevFiles. Unlike any other variable this one means something where it is empty."""
_OURS = ("LAUNCHER_", "SLURM_", "AWS_", "S3_", "OMP_", "TMPDIR", "HOME")
_LONGEST = 80  # characters of a value that a message shows


def text(name: str, default: str = "", env: Mapping[str, str] | None = None) -> str:
    """The value without space around it; the default where it is empty or not set."""
    return (os.environ if env is None else env).get(name, "").strip() or default


def whole(name: str, default: int | None = None, *, least: int = 0, env: Mapping[str, str] | None = None) -> int:
    """A whole number of at least ``least``.

    Raises:
        ConfigError: something else, or nothing where there is no default.
    """
    given = text(name, env=env)
    if not given and default is not None:
        return default
    if not given:
        raise ConfigError(f"{name} is not set: a whole number from {least} on is needed.")
    if not (given.isascii() and given.isdigit()) or int(given) < least:
        raise ConfigError(f"{name} = '{given[:_LONGEST]}': one whole number from {least} on is accepted; unset it, or set it so.")
    return int(given)


def seconds(name: str, default: float, env: Mapping[str, str] | None = None) -> float:
    """Seconds, more than none.

    Raises:
        ConfigError: something else.
    """
    given = text(name, env=env)
    try:
        found = float(given) if given else default
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):  # also what is no number
        raise ConfigError(f"{name} = '{given[:_LONGEST]}': seconds are accepted, more than 0; unset it, or set it so.")
    return found


def threads(default: int, env: Mapping[str, str] | None = None) -> int:
    """OMP_NUM_THREADS. A list, which OpenMP accepts for nested regions, has no meaning for ranks.

    Raises:
        ConfigError: no single number.
    """
    return whole("OMP_NUM_THREADS", default, least=1, env=env)


def visible_devices(env: Mapping[str, str] | None = None) -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; as CUDA reads it, an entry that is none ends the list. None where it is not set."""
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
    """HOME, if there is one: a container may run under a number that no user has, without the variable."""
    given = text("HOME", env=env)
    if given:
        return Path(given)
    try:
        return Path.home()
    except RuntimeError:
        return None


def temporary() -> Path:
    """The folder of temporary files.

    Raises:
        ConfigError: TMPDIR names no folder that can be written, where Python would silently take another one; or there is none at all.
    """
    named = text("TMPDIR")
    if named and not os.access(named, os.W_OK | os.X_OK):
        raise ConfigError(f"TMPDIR = {named[:_LONGEST]}: no folder that can be written; make it, or unset TMPDIR.")
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise ConfigError(f"there is no folder for temporary files ({error.strerror}); set TMPDIR to one that can be written.") from error


def check() -> None:
    """Refuse early, and in one place, what libraries would stumble over later, and fill in what they ask of a user who has no name.

    Raises:
        ConfigError: a variable is odd.
    """
    for name in [each for each, value in os.environ.items() if not value.strip() and each.startswith(_OURS)]:
        del os.environ[name]  # for libraries, too, which take an empty AWS_PROFILE for the name of one
    temporary()
    threads(1)
    if home() is None:
        os.environ["HOME"] = str(temporary())  # torch and boto3 look below it, for caches and settings that may be absent
    if not any(text(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd

        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"  # torch names its cache of compiled code by it
