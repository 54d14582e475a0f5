"""What a child inherits of signals, and what becomes of one whose parent is gone: seen from outside, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.signals import PREEMPTION_SIGNAL, STOP_SIGNALS
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT

_CHILD = "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('SigBlk')])"
_PARENT = """
import os, signal, subprocess, sys, time
from infra import signals
flag = signals.install()
if sys.argv[1] == "block":
    signals.block_in_children()
print(subprocess.run([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE, text=True).stdout.strip())
for number in signals.STOP_SIGNALS:
    flag.received = None
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 30
    while not flag and time.monotonic() < deadline:
        time.sleep(0.01)
    print(flag.received is number)
"""


def python(program: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LAUNCHER_PID"} | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("how", "blocked"), [("plain", {PREEMPTION_SIGNAL, signal.SIGHUP} & set(STOP_SIGNALS)), ("block", set(STOP_SIGNALS))])
def test_children_start_with_signals_blocked_that_their_parent_hears(how: str, blocked: set[signal.Signals]) -> None:
    output, error = python(_PARENT, how, _CHILD).communicate(timeout=PATIENCE_S)
    mask, *heard = output.split()
    assert {number for number in STOP_SIGNALS if int(mask, 16) >> (number - 1) & 1} == blocked, error
    assert heard == ["True"] * len(STOP_SIGNALS), error


_TIED = """
import os, sys, time
from infra import signals
signals.die_with_parent(*(int(word) for word in sys.argv[1:]))
print("alive", flush=True)
time.sleep(900)
"""


@pytest.mark.parametrize("variable", [False, True])
def test_a_child_whose_parent_ended_before_the_tie_ends_at_once(variable: bool) -> None:
    """The process with number 1 is not its parent."""
    process = python(_TIED, LAUNCHER_PID="1") if variable else python(_TIED, "1")
    assert process.communicate(timeout=PATIENCE_S)[0] == "" and process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("variable", [False, True])
def test_a_child_ends_with_its_parent_and_not_before(tmp_path: Path, variable: bool) -> None:
    tie = "os.environ['LAUNCHER_PID'] = str(os.getpid()); words = []" if variable else "words = [str(os.getpid())]"
    parent = python(
        f"import os, subprocess, sys; {tie}\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], *words], stdout=subprocess.PIPE, text=True)\n"
        "print(child.pid, child.stdout.readline(), flush=True)\nchild.wait()",
        _TIED,
    )
    assert parent.stdout is not None
    child, said = parent.stdout.readline().split()
    assert said == "alive" and _is_running(int(child))
    parent.kill()
    parent.wait()  # not communicate: the child holds its pipes too
    deadline = time.monotonic() + PATIENCE_S
    while _is_running(int(child)):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def _is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
