"""Clients of S3 for processes that run for weeks: one for each process and environment, replaced when its credentials change. Part of ``infra/s3.py``.

boto3 by itself renews credentials with an expiry date: web identities, instance and container roles, ``credential_process``. But it reads a credentials
file only once, and rotated keys are usually mounted as files; so here a changed file leads to a new client.
"""

from __future__ import annotations

import base64
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

from infra import environment, shown
from infra.errors import ConfigError

CONNECT_TIMEOUT_S = 10.0

_VARIABLES = (
    *("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    *("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_CA_BUNDLE", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "AWS_REQUEST_CHECKSUM_CALCULATION"),
    *("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ENDPOINT_URL_STS"),
)
_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS", "STORAGE_EMULATOR_HOST")
"""Of all stores: the last is Google's (``infra/cloud.py``)."""
_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_Stamp = tuple[tuple[int, int, int], ...]
_lock = threading.Lock()
_clients: dict[str, tuple[_Stamp, Any]] = {}


def client(attempts: int, read_timeout_s: float) -> Any:
    """The client of this process and environment. Clients do not survive a fork, and the environment may change (in tests it does).

    Args:
        attempts: how often each request is tried.
        read_timeout_s: seconds without data after which a request counts as broken.

    Raises:
        ConfigError: the endpoint is not a URL, or the file of certificates does not exist.
    """
    settings = "\n".join(os.environ.get(name, "") for name in _VARIABLES)
    key = hashlib.sha256(f"{os.getpid()} {attempts} {read_timeout_s} {settings}".encode()).hexdigest()
    stamp = _stamp()
    with _lock:
        known = _clients.get(key)
        if known is not None and known[0] == stamp:
            return known[1]
        made, good = _connect(attempts, read_timeout_s, known is not None)
        if good:
            _clients[key] = (stamp, made)
        elif known is not None:
            return known[1]  # the file is just being written: the old keys may still work, and the next request looks again
        return made


def refuse_passwords() -> None:
    """Refuse an environment whose endpoints carry a password, before anything is stored.

    Raises:
        ConfigError: one does; the message names the variable, and does not quote its value.
    """
    for name in _ENDPOINTS:
        if shown.place_holds_password(os.environ.get(name, "")):
            raise ConfigError(f"{name}: {shown.NO_PASSWORDS}")


def _stamp() -> _Stamp:
    """A value that changes with the credentials files. Mounted secrets are replaced by changing a link, so it describes the file behind the link."""
    found = []
    for variable, usual in _FILES.items():
        try:
            stat = _place(environment.text(variable) or usual).stat()
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _name_its_md5(params: dict[str, Any], **_: Any) -> None:
    """Add Content-MD5, without which many servers refuse to delete several objects. boto3 sends another checksum, which AWS accepts instead."""
    body = params["body"]
    digest = hashlib.md5(body if isinstance(body, bytes) else str(body).encode(), usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _place(name: str) -> Path:
    """A path with ~ expanded; unchanged where there is no home folder (a container under a uid without a user name)."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _connect(attempts: int, read_timeout_s: float, careful: bool) -> tuple[Any, bool]:
    """A client, and whether to keep it; one without credentials is not kept, because credentials may appear later.

    Args:
        careful: return no client instead of failing.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    refuse_passwords()
    endpoint = environment.text("S3_ENDPOINT_URL") or None
    bundle = environment.text("AWS_CA_BUNDLE")
    if bundle and not _place(bundle).exists():
        raise ConfigError(f"AWS_CA_BUNDLE = {bundle}: there is no such file; name one of certificates, or unset it.")
    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=read_timeout_s,
        max_pool_connections=16,
        s3={"addressing_style": "path"} if endpoint else None,  # the host name bucket.host resolves on AWS, but rarely elsewhere
    )
    try:
        session = boto3.session.Session()
        made = session.client("s3", endpoint_url=endpoint, config=config)
        made.meta.events.register("before-call.s3.DeleteObjects", _name_its_md5)
        return made, session.get_credentials() is not None
    except ValueError as error:
        raise ConfigError(f"S3_ENDPOINT_URL = {endpoint}: {error}; expected a URL such as http://host:port.") from error
    except BotoCoreError:
        if careful:
            return None, False
        raise
