"""kubectl, as a command. No torch."""

from __future__ import annotations

import re
import shlex
import subprocess

from infra.errors import ConfigError

PATIENCE = "--request-timeout=20s"
"""Option for requests to a cluster: by default kubectl waits for ever."""
_LOG_LINE = re.compile(r"[EWI]\d{4} \d\d:\d\d:\d\d")


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
        raise ConfigError(f"kubectl {shlex.join(arguments)} ended with {done.returncode}: {_said(done.stderr)}")
    return done.stdout


def _said(text: str) -> str:
    """What kubectl says, without the log lines of its library, which come five times before a sentence such as 'the connection was refused'."""
    lines = text.strip().splitlines()
    return "\n".join(line for line in lines if not _LOG_LINE.match(line)) or "\n".join(lines)
