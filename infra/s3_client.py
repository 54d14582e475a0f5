"""Clients of S3, for weeks: one for each process and environment, made anew where its credentials have changed. Part of ``infra/s3.py``.

boto3 renews by itself what has a date of expiry: web identities, instance and container roles, ``credential_process``. It reads a credentials file once,
though, and files are how rotated keys are mounted: here a changed file makes a new client.
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
_ENDPOINTS = ("S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL_STS")
_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
_Stamp = tuple[tuple[int, int, int], ...]
_lock = threading.Lock()
_clients: dict[str, tuple[_Stamp, Any]] = {}


def client(attempts: int, read_timeout_s: float) -> Any:
    """The client of this process and environment: clients do not survive a fork, and an environment may change (in tests it does).

    Args:
        attempts: of each request.
        read_timeout_s: silence of the server after which a request counts as broken.

    Raises:
        ConfigError: the endpoint is no URL, or there are no certificates where they are said to be.
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
            return known[1]  # a file that is just being written; the old keys may still do, and the next request looks again
        return made


def refuse_passwords() -> None:
    """Refuse an environment whose endpoints carry a password, before anything is stored.

    Raises:
        ConfigError: the variable is named, its value masked.
    """
    for name in _ENDPOINTS:
        if shown.holds_password(os.environ.get(name, "")):
            raise ConfigError(f"{name} = {os.environ[name]}: {shown.NO_PASSWORDS}")


def _stamp() -> _Stamp:
    """What changes with the credentials files; mounted secrets are links that are exchanged, so the file behind counts."""
    found = []
    for variable, usual in _FILES.items():
        try:
            stat = _place(environment.text(variable) or usual).stat()
            found.append((stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append((0, 0, 0))
    return tuple(found)


def _name_its_md5(params: dict[str, Any], **_: Any) -> None:
    """Add Content-MD5, without which many servers delete nothing; boto3 sends another checksum, which AWS accepts in its place."""
    body = params["body"]
    digest = hashlib.md5(body if isinstance(body, bytes) else str(body).encode(), usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


def _place(name: str) -> Path:
    """A path whose ~ is HOME; as it is where nobody has one (a container under a number without a name)."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _connect(attempts: int, read_timeout_s: float, careful: bool) -> tuple[Any, bool]:
    """A client, and whether it is worth keeping: one without credentials is not, for they may come. ``careful``: give none rather than fail."""
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
        s3={"addressing_style": "path"} if endpoint else None,  # bucket.host resolves on AWS, rarely elsewhere
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
