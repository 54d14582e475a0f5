"""A real SLURM of three nodes on this machine: preemption, a lost node, a requeue, a wrong configuration. Several minutes.

Needs root and the packages slurm-wlm and munge (Debian: apt-get install --no-install-recommends slurm-wlm munge); skipped elsewhere, where
test_slurm.py runs the same scripts against stand-ins.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_MISSING = [path for path in ("/usr/sbin/slurmctld-wlm", "/usr/sbin/slurmd-wlm", "/usr/sbin/munged") if not Path(path).exists()]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(bool(_MISSING) or os.geteuid() != 0, reason=f"no real SLURM here: needs root and {', '.join(_MISSING) or 'nothing else'}"),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    state = tmp_path_factory.mktemp("slurm")
    environment = os.environ | {"SLURM_LOCAL": str(state), "SLURM_CONF": str(state / "etc" / "slurm.conf"), "CUDA_VISIBLE_DEVICES": "0"}
    environment["LAUNCHER_VENV"] = str(Path(sys.executable).parent.parent)
    subprocess.run([str(ROOT / "tests" / "slurm_local.sh"), "up", "3"], check=True, env=environment, timeout=120)
    yield environment
    subprocess.run([str(ROOT / "tests" / "slurm_local.sh"), "down"], check=False, env=environment, timeout=120)


@pytest.fixture
def run(slurm: dict[str, str], tmp_path: Path) -> Path:
    words = ["prepare", "tiny", f"run.root={tmp_path}", "dvae_fit.steps=60", "dvae_fit.eval_every=60", "--nproc", "1"]
    subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words], check=True, timeout=240)
    return tmp_path / "tiny"


def submit(slurm: dict[str, str], run: Path, *options: str, stage: str = "dvae") -> str:
    command = ["sbatch", "--parsable", f"--output={run}/%x-%j.out", *options, str(ROOT / "infra/slurm" / f"{stage}.sbatch"), str(run)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=slurm, cwd=ROOT).stdout.strip()


def state(slurm: dict[str, str], job: str) -> dict[str, str]:
    shown = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True, env=slurm).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def wait(condition: Callable[[], bool], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def ended(slurm: dict[str, str], job: str) -> Callable[[], bool]:
    def look() -> bool:
        subprocess.run(
            ["scontrol", "update", f"jobid={job}", "starttime=now"], capture_output=True, env=slurm, check=False
        )  # no wait after a requeue
        return state(slurm, job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    return look


def attempts(run: Path, stage: str = "dvae") -> list[int]:
    return [json.loads(path.read_text())["code"] for path in sorted((run / "exits" / stage).glob("attempt-*/end.json"))]


@pytest.mark.parametrize("how", ["usr2", "requeue", "kill-node"])
def test_a_disturbed_job_of_two_nodes_goes_on_to_its_end(slurm: dict[str, str], run: Path, how: str) -> None:
    job = submit(slurm, run, "--nodes=2")
    wait(lambda: (run / "dvae/metrics/attempt-0.jsonl").exists())
    if how == "usr2":
        subprocess.run(["scancel", "--signal=USR2", job], check=True, env=slurm)
    elif how == "requeue":
        subprocess.run(["scontrol", "requeue", job], check=True, env=slurm)
    else:
        subprocess.run([str(ROOT / "tests/slurm_local.sh"), "kill-node", "2"], check=True, env=slurm)
        wait(lambda: state(slurm, job)["JobState"] != "RUNNING")
        subprocess.run([str(ROOT / "tests/slurm_local.sh"), "node", "2"], check=True, env=slurm)
    wait(ended(slurm, job), 600)
    assert state(slurm, job)["JobState"] == "COMPLETED" and int(state(slurm, job)["Restarts"]) >= 1
    assert (run / "dvae/done.json").exists() and attempts(run)[-1] == 0


def test_a_wrong_configuration_is_not_retried(slurm: dict[str, str], run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["dvae_fit"]["batch"] = 7
    (run / "config.json").write_text(json.dumps(config))
    job = submit(slurm, run, "--nodes=2")
    wait(ended(slurm, job))
    assert (state(slurm, job)["ExitCode"], state(slurm, job)["Restarts"]) == ("78:0", "0")


def test_the_chain_brings_the_whole_tiny_pipeline(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ["demo", "tiny", f"run.root={tmp_path}", "cluster.cpus=1", "cluster.memory_gib=2", "cluster.shares=2", "--on", "slurm"]
    subprocess.run([sys.executable, str(ROOT / "launcher.py"), *words], check=True, env=slurm, cwd=ROOT, timeout=240)
    wait(lambda: (tmp_path / "tiny/report.html").exists(), 1200)
