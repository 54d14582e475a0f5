"""kubectl, as a command. No torch."""

from __future__ import annotations

import shlex
import subprocess

from infra.errors import ConfigError

PATIENCE = "--request-timeout=20s"
"""Option for requests to a cluster: by default kubectl waits for ever."""


def run(arguments: list[str], given: str | None = None) -> str:
    """Run kubectl and return what it prints.

    Raises:
        ConfigError: it is not installed, or it fails.
    """
    try:
        done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("kubectl is not installed here: --on k8s renders and applies with it.") from error
    if done.returncode:
        raise ConfigError(f"kubectl {shlex.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
