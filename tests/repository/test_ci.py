""".ci/run with stand-ins for make and apt-get: what it needs and cannot have is said, and stops nothing. About 2 s."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.root import ROOT

# As `make demo` it leaves a report where it was told to.
MAKE = """#!/bin/sh
echo "make $*"
for word in "$@"; do case $word in ARGS=run.root=*) head -c 2000 /dev/zero > "${word#ARGS=run.root=}/report.html" ;; esac; done
"""


@pytest.mark.parametrize(
    ("user", "apt_get", "said", "calls"),
    [
        ("1000", "exit 0", "not installed: that needs root and apt-get", 0),
        ("0", "exit 0", "", 1),
        ("0", "exit 100", "not installed: apt-get failed", 2),
        ("0", 'case "$*" in *update) touch updated ;; *) [ -e updated ] ;; esac', "", 3),
    ],
)
def test_ci_installs_a_real_slurm_where_it_can_and_goes_on_where_it_cannot(tmp_path: Path, user: str, apt_get: str, said: str, calls: int) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    (tmp_path / "bin").mkdir()
    programs = {"make": MAKE, "id": f"#!/bin/sh\necho {user}\n", "apt-get": f'#!/bin/sh\necho "$@" >> calls\n{apt_get}\n'}
    programs["npm"] = '#!/bin/sh\necho "npm $*"\n'
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("bash", "sh", "dirname", "mkdir", "mktemp", "rm", "date", "find", "head", "wc", "timeout", "touch"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    env = {"PATH": str(tmp_path / "bin"), "HOME": os.environ.get("HOME", "/")}
    done = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout and ("not installed" in done.stdout) == bool(said) and "CI: all passed" in done.stdout
    asked = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert len(asked) == calls and all("slurm-wlm munge" in line or "update" in line for line in asked)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("make")] == ["check", "test", "demo"]
    assert re.search(r"^npm install .*--prefix \S+/\.venv-ci-\w+/azurite azurite@", done.stdout, re.MULTILINE)
    assert not list((tmp_path / "runs").iterdir()) and not list(tmp_path.glob(".venv*")), "it cleans up after itself"
