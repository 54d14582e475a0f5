"""Two launchers with two ranks each on this machine, as two nodes of one job: each in a mount namespace with its own /dev/shm and temporary folder."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from infra.errors import ExitCode
from infra.job import RETRIES
from infra.ledger import Verdict
from infra.run_folder import RunFolder
from tests.support.processes import alive, ranks_under
from tests.support.root import ROOT
from train.run.cluster import Start, verdict

NODES, RANKS = 2, 2
_JOB = "soak"
_PEER_S = 20
"""What a scheduler gives the other launchers once one has failed, before it ends them."""
_SPACES = ["unshare", "--mount", "--propagation", "private"]
_SET_UP = 'mount -t tmpfs -o size=1g tmpfs /dev/shm && mount -t tmpfs -o size=3g tmpfs "$TMPDIR" && exec "$@"'


def available() -> bool:
    """Whether mount namespaces can be made here."""
    return subprocess.run([*_SPACES, "true"], capture_output=True, check=False).returncode == 0


class Gang:
    """One job: started, struck, ended and started again, as a scheduler would by the codes."""

    def __init__(self, run: RunFolder, stage: str, environment: dict[str, str], folder: Path) -> None:
        self.run, self.stage, self.folder = run, stage, folder
        self.environment = environment
        self.restart = -1
        self.launchers: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start, or start again."""
        self.restart += 1
        port = _free_port()
        self.launchers = [self._launcher(node, port) for node in range(NODES)]

    def _launcher(self, node: int, port: int) -> subprocess.Popen[bytes]:
        scratch = self.folder / f"tmp-{node}"
        scratch.mkdir(parents=True, exist_ok=True)
        job = {"JOB": _JOB, "RESTART": self.restart, "NODE": node, "NODES": NODES, "RENDEZVOUS": f"127.0.0.1:{port}", "ADDRESS": "127.0.0.1"}
        environment = os.environ | {f"LAUNCHER_{name}": str(value) for name, value in job.items()}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NODE_NAME": f"node-{node}", "TMPDIR": str(scratch)} | self.environment
        words = [sys.executable, str(ROOT / "launcher.py"), self.stage, self.run.url, "--nproc", str(RANKS)]
        with (self.folder / f"node-{node}.log").open("ab") as log:
            log.write(f"== restart {self.restart}\n".encode())
            log.flush()
            return subprocess.Popen(
                [*_SPACES, "sh", "-c", _SET_UP, "sh", *words], env=environment, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
            )

    def ranks(self, node: int) -> list[int]:
        """Process numbers of a node's ranks."""
        return ranks_under(self.launchers[node].pid)

    def ended(self) -> bool:
        """Whether a launcher has ended."""
        return any(launcher.poll() is not None for launcher in self.launchers)

    def finish(self, timeout_s: float) -> Verdict:
        """Wait for the end, end what outlives the first failure, and say what follows by the ledger.

        Raises:
            TimeoutExpired: no launcher ends in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.stage, timeout_s)
            time.sleep(0.1)
        deadline = time.monotonic() + _PEER_S
        while any(launcher.poll() is None for launcher in self.launchers) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill()
        codes = [launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode for launcher in self.launchers]
        code = max(codes) if any(codes) else ExitCode.DONE
        return verdict(self.stage, self.run, Start(_JOB, self.restart, code), RETRIES)

    def kill(self) -> None:
        """End what is left, and leave nothing behind."""
        for launcher in self.launchers:
            pids = ranks_under(launcher.pid)
            if launcher.poll() is None:
                launcher.kill()
            launcher.wait()
            while any(alive(pid) for pid in pids):
                time.sleep(0.05)  # ranks die with their launcher

    def fill_disk(self, node: int) -> None:
        """Let a node's temporary folder hold no byte more than it does: a full disk."""
        inside = ["nsenter", "-t", str(self.launchers[node].pid), "--mount"]
        place = str(self.folder / f"tmp-{node}")
        for _ in range(50):  # what is in use may grow between the look and the limit, which is then refused
            used = subprocess.run([*inside, "stat", "-f", "-c", "%b %f %S", place], capture_output=True, text=True, check=True)
            total, free, block = map(int, used.stdout.split())
            limit = [*inside, "mount", "-o", f"remount,size={max(1, total - free) * block}", place]
            if subprocess.run(limit, check=False, capture_output=True).returncode == 0:
                return
        raise AssertionError(f"{place} would not be limited to what it holds")

    def empty_disk(self, node: int) -> None:
        """Lift the limit again."""
        inside = ["nsenter", "-t", str(self.launchers[node].pid), "--mount"]
        subprocess.run([*inside, "mount", "-o", "remount,size=3g", str(self.folder / f"tmp-{node}")], check=True, capture_output=True)


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
