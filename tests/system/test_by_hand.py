"""The example of docs/cluster.md that starts a launcher on each of two machines by ssh: run as it stands there, with this machine in place of both. About 40 s."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.errors import ExitCode
from infra.run_folder import RunFolder
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from tests.support.stopped_run import FIXTURE
from tests.train.verbs.test_status import of, until
from train.verbs import cancel

SSH = """#!/bin/sh
echo "$1" >> {folder}/asked
sh -c "$2"
code=$?
echo "$code" >> {folder}/codes
exit $code
"""


def example() -> str:
    """The lines of the page."""
    section = (ROOT / "docs" / "cluster.md").read_text().partition("## Two machines and no scheduler\n")[2]
    return section.partition("```sh\n")[2].partition("```")[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_launchers_that_ssh_starts_train_together_and_are_stopped_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    run = RunFolder(str(tmp_path / "run"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH.format(folder=tmp_path))
    (tmp_path / "bin" / "ssh").chmod(0o755)
    lines = example()
    stage = f"clip {run.url} --nproc 1 --go-on clip_fit.steps=100000 clip_fit.eval_every=100000"
    for there, here in ((r"\bn[12]\b", "localhost"), ("29400", str(free_port())), ("dalle /shared/runs/mine", stage), (r"\$PWD", str(ROOT))):
        lines, count = re.subn(there, here, lines)
        assert count, f"docs/cluster.md no longer says {there}"
    python = str(Path(sys.executable).parent)
    given = os.environ | {"PATH": f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}", "LAUNCHER_LIVE_S": "0.2", "LAUNCHER_HANG_S": "300"}
    script = subprocess.Popen(["bash", "-ec", lines], cwd=tmp_path, env=given, start_new_session=True)
    try:
        found = until(lambda: each if (each := of(run, "clip")).done > 10 or script.poll() is not None else None, 300)
        assert (found.state, set(found.heard_s), found.job[:8]) == ("running", {0, 1}, "by-hand-")
        cancel.main(run.url)
        assert script.wait(PATIENCE_S) == 0, "wait, without an argument, ends with 0"
    finally:
        if script.poll() is None:
            os.killpg(script.pid, signal.SIGKILL)
        logs = {node: (tmp_path / f"node-{node}.log").read_text() for node in (0, 1)}
    assert (tmp_path / "asked").read_text().split() == ["localhost"] * 2
    assert (tmp_path / "codes").read_text().split() == [str(int(ExitCode.REQUEUE))] * 2, logs
    assert re.search(r"\[rank 0\] \S+ clip: resumed after update 4", logs[0] + logs[1]), "whichever of them has it"
    ended = of(run, "clip")
    assert ended.state == "ended" and ended.end.startswith("REQUEUE: ") and ended.saved == ended.done > 10
