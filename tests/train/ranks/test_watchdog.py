"""A hung rank ends its job in bounded time, and is named with the place where it stood: two real ranks. About 40 s of CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from infra.run_folder import RunFolder
from infra.world import World
from tests.support.patience import PATIENCE_S
from tests.support.processes import ranks_of
from tests.system.test_launcher import LAUNCHER, copied
from train.advice import facts, words
from train.advice.rules import decide
from train.ranks import watchdog
from train.ranks.watchdog import Watchdog
from train.weights.checkpointer import Checkpointer

HANG_S = 16
"""Who waits for others waits for a quarter longer, less the second between two looks: 3 s for the other rank to end first."""
_BOUND_S = 600
"""HANG_S, a little more for those that wait, 30 s until the launcher kills what was stopped, and the starts; generous, for slow machines."""
STUCK = """
import os, sys, threading, time

def patch():
    while not hasattr(sys.modules.get("train.loop.trainer"), "Trainer"):
        time.sleep(0.01)
    update = sys.modules["train.loop.trainer"].Trainer._update
    def stuck(self, step, started):
        if step == 3:
            time.sleep(3600)
        return update(self, step, started)
    sys.modules["train.loop.trainer"].Trainer._update = stuck

if os.environ.get("RANK") == "1":
    threading.Thread(target=patch, daemon=True).start()
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    words = ["prepare", "tiny", f"run.root={root}", "dvae_fit.steps=400", "dvae_fit.eval_every=400", "dvae_fit.save_every=400"]
    subprocess.run([sys.executable, LAUNCHER, *words, "--nproc", "1"], check=True, capture_output=True, timeout=_BOUND_S)
    return root / "tiny"


run = pytest.fixture(copied)


def start(run: Path, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, LAUNCHER, "dvae", str(run), "--nproc", "2"]
    given = os.environ | {"LAUNCHER_HANG_S": str(HANG_S)} | environment
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=given)


def test_a_rank_that_sleeps_in_a_step_ends_the_job_and_is_named_with_its_stack(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STUCK)
    process = start(run, PYTHONPATH=str(tmp_path))
    output = process.communicate(timeout=_BOUND_S)[0]
    assert process.returncode == 1, output
    code, reason = RunFolder(str(run)).root_cause("dvae", 0, 2)
    assert code == 1 and reason.startswith(f"rank 1: no progress for {HANG_S} s; it stands at train/loop/trainer.py:"), reason
    assert "in _train, inside stuck (sitecustomize.py)" in reason and reason in output
    assert "sitecustomize.py" in output and "in stuck\n" in output, "the stack is printed"
    found = facts.gather(RunFolder(str(run)), "dvae")
    assert found is not None and decide(found)[0].name == "a rank hung" and "verdict  RESTART: " in output, "the attempt ends with it"
    assert re.search(r"  stack    rank 1: File .*sitecustomize\.py., line \d+ in stuck", words.of(found)), words.of(found)


def test_a_rank_that_cannot_speak_is_named_by_its_peers_and_killed(run: Path) -> None:
    process = start(run)
    lines, deadline = run / "dvae" / "metrics" / "attempt-0.jsonl", time.monotonic() + _BOUND_S
    while not lines.exists() or lines.read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no update"
        time.sleep(0.05)
    stopped = max(ranks_of(run), key=lambda pid: b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(stopped, signal.SIGSTOP)
    output = process.communicate(timeout=_BOUND_S)[0]
    assert process.returncode == 1, output
    assert not Path(f"/proc/{stopped}").exists(), "killed"
    code, reason = RunFolder(str(run)).root_cause("dvae", 0, 2)
    assert code == 1 and reason.startswith("rank 1 ended without a record: it was killed; rank 0: no progress"), reason
    assert "it waits for other ranks at train/" in reason and f"on this node rank 1 (process {stopped}) is stopped" in reason, reason
    assert "Thread" in output and reason in output


def test_a_suspended_process_is_not_taken_for_a_hung_one(tmp_path: Path) -> None:
    """SLURM suspends jobs by SIGSTOP: time that did not pass for the process does not count."""
    program = (
        "import os, time; from train.ranks import watchdog\n"
        "os.environ['LAUNCHER_HANG_S'] = '2'\n"
        "watchdog.start(lambda code, reason: print(reason, flush=True)); watchdog.beat(); print('go', flush=True)\n"
        "time.sleep(1.0); watchdog.beat(); time.sleep(1.0); watchdog.rest(); print('well', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(LAUNCHER).parent
    )
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=PATIENCE_S)[0] == "well\n" and process.returncode == 0


def test_who_waits_for_others_gives_them_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ended = threading.Event()
    monkeypatch.setattr(watchdog, "_WAITING", ("threading.py",))  # where this thread stands below
    monkeypatch.setattr(watchdog, "suspects", lambda: ["rank 1 (process 7) is stopped"])
    patient = Watchdog(2.0, lambda code, reason: said.append(reason), lambda code: ended.set())
    began = time.monotonic()
    patient.beat()
    assert ended.wait(PATIENCE_S) and time.monotonic() - began >= 2.5
    assert "it waits for other ranks at tests/train/ranks/test_watchdog.py" in said[0] and said[0].endswith(
        "; on this node rank 1 (process 7) is stopped"
    )


@pytest.mark.parametrize(("place", "waits"), [("/torch/distributed/distributed_c10d.py", True), ("/infra/storage.py", False)])
def test_who_waits_for_a_peers_half_of_a_checkpoint_waits_for_others_and_who_cannot_write_its_own_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, waits: bool
) -> None:
    said, gate, stand = list[str](), list[int](), dict[str, Any]()
    exec(compile("def stand(gate, sleep):\n    while not gate:\n        sleep(0.01)", place, "exec"), stand)
    monkeypatch.setattr(watchdog, "suspects", lambda: ["rank 1 (process 7) is stopped"])
    saver = Checkpointer(str(tmp_path), World.single(), keep=1)
    saver._job = saver._thread.submit(stand["stand"], gate, time.sleep)
    Watchdog(0.5, lambda code, reason: said.append(reason), lambda code: gate.append(code)).beat()
    saver.wait()
    assert ("it waits for other ranks" if waits else "it stands") + " at train/weights/checkpointer.py" in said[0]
    assert said[0].endswith("; on this node rank 1 (process 7) is stopped") == waits


def test_stacks_are_shown_on_request(tmp_path: Path) -> None:
    program = (
        "import sys; from train.ranks import watchdog; watchdog.start(print); print('go', flush=True); sys.stdin.read(); print('on', flush=True)"
    )
    command, pipe = [sys.executable, "-c", program], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, cwd=Path(LAUNCHER).parent)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    process.send_signal(watchdog.STACK_SIGNAL)
    output = process.communicate(timeout=PATIENCE_S)[0]  # ends its input
    assert "most recent call first" in output and output.endswith("on\n") and process.returncode == 0


def test_an_environment_in_the_repository_is_not_ours() -> None:
    """`make` puts one there: a rank in a collective stands at our line, not at torch's."""
    assert watchdog._is_ours(f"{watchdog.REPOSITORY}/train/loop/trainer.py")
    assert not watchdog._is_ours(f"{watchdog.REPOSITORY}/.venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py")
    assert not watchdog._is_ours("/usr/lib/python3.11/threading.py")
