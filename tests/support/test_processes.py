"""Who is a rank, by what the kernel lists: the tests that kill ranks stand on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.processes import of_run, ranks_of, ranks_under

_FORKS = "import os, sys, time\npid = os.fork()\nif pid:\n    print(pid, flush=True)\ntime.sleep(60)"
"""A rank with a child that is still itself, as each program that it starts is for a moment."""


def test_what_a_rank_forks_is_no_rank(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    with subprocess.Popen([sys.executable, "-c", _FORKS, "launcher.py", "dalle", str(run), "--worker"], stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        forked = int(rank.stdout.readline())
        try:
            assert ranks_of(run) == [rank.pid] and rank.pid in ranks_under(os.getpid()) and forked not in ranks_under(rank.pid)
            assert sorted(of_run(run)) == sorted([rank.pid, forked]), "but it must not outlive the run"
        finally:
            os.kill(forked, 9)
            rank.kill()
