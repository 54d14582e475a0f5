"""Requests that a training stage sends to S3, counted at a proxy in front of a real server: ``python -m tests.support.counted_requests`` prints the table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from infra import storage
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.root import ROOT
from tests.support.s3_server import S3Server, serve

SIZES = (1, 2, 4)
_KINDS = (
    (r"/exits/", "ledger"),
    (r"/checkpoints/", "checkpoints"),
    (r"/(config|provenance)\.json", "configuration"),
    (r"/locks/", "lease"),
    (r"/live/", "signs of life"),
    (r"/(metrics|tensorboard|pictures|logs|attention)/", "metrics"),
    (r"/images/.*/(index|manifest)\.json|/prepare/done\.json", "indexes"),
    (r"/images/", "data"),
)
_SMALL = ["dvae_fit.steps=10", "dvae_fit.save_every=10", "dvae_fit.eval_every=10", "dvae_fit.keep=1"]


def told_apart(lines: list[str]) -> Counter[tuple[str, str]]:
    """(what it is about, GET or HEAD or LIST ...) -> requests."""
    found: Counter[tuple[str, str]] = Counter()
    for line in lines:
        method, _, path = line.partition(" ")
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        name = "/" + unquote(query["prefix"][0]) if "prefix" in query else unquote(parts.path)
        verb = "LIST" if method == "GET" and "list-type" in query else "DELETE" if "delete" in query or "delete=" in path else method
        found[next((kind for pattern, kind in _KINDS if re.search(pattern, name)), "rest"), verb] += 1
    return found


def stage(url: str, ranks: int, *words: str) -> None:
    """Run the dVAE's stage of a run to its end.

    Raises:
        CalledProcessError: it ends otherwise.
    """
    command = [sys.executable, str(ROOT / "launcher.py"), "dvae", url, *words, "--nproc", str(ranks)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def prepared(folder: Path) -> Path:
    """A run whose images are prepared, on this machine."""
    words = [sys.executable, str(ROOT / "launcher.py"), "prepare", "tiny", f"run.root={folder}", "dvae_fit.batch=8", *_SMALL, "--nproc", "1"]
    subprocess.run(words, check=True, capture_output=True)
    return folder / "tiny"


def counted(proxy: FaultProxy, run: Path, url: str, ranks: int) -> dict[str, Counter[tuple[str, str]]]:
    """What the first start and a second one, which restores a checkpoint, ask for; ten updates and a save each."""
    storage.upload_folder(run, url, last=["config.json"])
    found = {}
    for name, words in (("start", ()), ("restart", ("dvae_fit.steps=20", "--go-on"))):
        proxy.requests.clear()
        stage(url, ranks, *words)
        found[name] = told_apart(proxy.requests)
    return found


def _main(server: S3Server, folder: Path) -> None:
    os.environ |= {name: value for name, value in server.environment.items() if value is not None}
    run = prepared(folder)
    with fault_proxy(server.endpoint) as proxy:
        os.environ["S3_ENDPOINT_URL"] = proxy.endpoint
        for ranks in SIZES:
            for name, counts in counted(proxy, run, f"s3://{server.create_bucket()}/runs/tiny", ranks).items():
                print(f"{name}, {ranks} ranks: {sum(counts.values())} requests")
                for (kind, verb), count in sorted(counts.items()):
                    print(f"    {kind:14} {verb:7} {count}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch, "s3")) as running:
        _main(running, Path(scratch))
