"""A real SLURM of a few nodes on this machine, for tests: starts it, asks it, and leaves nothing behind (tests/support/slurm_local.sh)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from tests.support import k8s_local
from tests.support.processes import stat
from tests.support.root import ROOT

PATIENCE_S = 1200.0
"""For any single thing to happen, on the slowest of machines."""
_SCRIPT = str(ROOT / "tests" / "support" / "slurm_local.sh")
_PROGRAMS = ("/usr/sbin/slurmctld-wlm", "/usr/sbin/slurmd-wlm", "/usr/sbin/munged", "/usr/bin/sbatch")
_ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def missing() -> str:
    """Why no SLURM can be started here; empty where one can."""
    absent = [path for path in _PROGRAMS if not Path(path).exists()]
    if absent:
        return f"no real SLURM here: {', '.join(absent)} (Debian: apt-get install --no-install-recommends slurm-wlm munge)"
    return "" if k8s_local.available() and shutil.which("ip") else "no real SLURM here: that needs root, unshare and ip"


class Cluster:
    """Nodes n1, n2, ... in namespaces of their own, for the length of a ``with``; they end with this process, however it ends."""

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder, self.nodes = folder, nodes
        # One rank on each node; nothing of an enclosing job or of the tester's own settings.
        kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS", "TMPDIR") if name in os.environ}
        self.environment = kept | {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "SLURM_LOCAL": str(folder),
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "LAUNCHER_VENV": str(Path(sys.executable).parent.parent),
            "CUDA_VISIBLE_DEVICES": "0",
        }

    def __enter__(self) -> Cluster:
        command = ["bash", _SCRIPT, "hold", str(self.nodes)]
        self._holder = subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True)
        assert self._holder.stdout is not None
        line = self._holder.stdout.readline()
        if line != "up\n":
            self._holder.kill()
            raise RuntimeError(f"SLURM did not start: see {self.folder / 'log'}")
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        self._inside = ["nsenter", "-t", children.read_text().split()[0], "--net", "--uts", "--mount", "--pid"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._holder.kill()  # unshare, and with it (--kill-child) the first process of the namespace, and with that everything inside
        self._holder.communicate()

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """Run a command as on a login node, in the repository; returns its output."""
        command = [*self._inside, "sh", "-c", 'cd "$0" && exec "$@"', str(ROOT), *words]
        env = self.environment | dict(environment or {})
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, script: str, *words: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit one of infra/slurm/*.sbatch by hand; returns the job's id."""
        return self.run("sbatch", "--parsable", *options, f"infra/slurm/{script}.sbatch", *words, environment=environment).strip()

    def jobs(self, job: str) -> list[dict[str, str]]:
        """What scontrol says of a job, or of all the tasks of an array."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines if line.startswith("JobId=")]

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job that is no array."""
        (found,) = self.jobs(job)
        return found

    def wait(self, what: str, condition: Callable[[], object]) -> None:
        """Wait for something to be so."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S:.0f} s\n{self.run('squeue', '--all')}"
            time.sleep(0.2)

    def wait_for_end(self, job: str) -> list[dict[str, str]]:
        """Wait until a job, or all tasks of an array, have ended."""
        self.wait(f"the end of job {job}", lambda: all(one["JobState"] in _ENDS for one in self.jobs(job)))
        return self.jobs(job)

    def tasks(self, node: str) -> list[int]:
        """Process numbers, as seen from outside, of the launchers and ranks that run on a node.

        What they fork shows their command line, until it becomes another program: it is neither.
        """
        marks, found = {f"SLURM_LOCAL={self.folder}".encode(), f"SLURMD_NODENAME={node}".encode()}, {}
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes()
                if b"launcher.py" in command and marks <= set((path / "environ").read_bytes().split(b"\0")):
                    found[int(path.name)] = int(stat(int(path.name))[1]), command
        return [pid for pid, (parent, command) in found.items() if parent not in found or found[parent][1] != command]

    def node(self, action: str, number: int) -> None:
        """``kill-node`` (kill -9 of its slurmd) or ``node`` (start it)."""
        self.run("bash", _SCRIPT, action, str(number))
