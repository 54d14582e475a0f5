""".ci/run with stand-ins for make and apt-get: what it needs and cannot have is said, and stops nothing. About 2 s."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT

# As `make demo` it leaves a report where it was told to.
MAKE = """#!/bin/sh
echo "make $*"
case "$*" in "test") [ ! -e fails ] || exit 2 ;; test*) [ ! -e fails_alone ] || exit 2 ;; esac
for word in "$@"; do case $word in ARGS=run.root=*) head -c 2000 /dev/zero > "${word#ARGS=run.root=}/report.html" ;; esac; done
"""


def _run(folder: Path, programs: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """.ci/run in a folder of its own, with these programs and npm as stand-ins."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci")
    (folder / "bin").mkdir()
    for name, text in (programs | {"npm": '#!/bin/sh\necho "npm $*"\n'}).items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in ("bash", "sh", "dirname", "mkdir", "mktemp", "rm", "date", "find", "head", "wc", "timeout", "touch"):
        (folder / "bin" / name).symlink_to(str(shutil.which(name)))
    env = {"PATH": str(folder / "bin"), "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(["bash", str(folder / ".ci" / "run")], capture_output=True, text=True, env=env, timeout=PATIENCE_S, check=False)


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
    done = _run(tmp_path, {"make": MAKE, "id": f"#!/bin/sh\necho {user}\n", "apt-get": f'#!/bin/sh\necho "$@" >> calls\n{apt_get}\n'})
    assert done.returncode == 0, done.stdout + done.stderr
    assert said in done.stdout and ("not installed" in done.stdout) == bool(said) and "CI: all passed" in done.stdout
    asked = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert len(asked) == calls and all("slurm-wlm munge" in line or "update" in line for line in asked)
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("make")] == ["check", "test", "demo"]
    assert re.search(r"^npm install .*--prefix \S+/\.venv-ci-\w+/azurite azurite@", done.stdout, re.MULTILINE)
    assert not list((tmp_path / "runs").iterdir()) and not list(tmp_path.glob(".venv*")), "it cleans up after itself"


@pytest.mark.parametrize("alone", [True, False])
def test_tests_that_fail_run_again_alone_and_a_second_failure_ends_it(tmp_path: Path, alone: bool) -> None:
    (tmp_path / "fails").touch()
    if not alone:
        (tmp_path / "fails_alone").touch()
    done = _run(tmp_path, {"make": MAKE, "id": "#!/bin/sh\necho 1000\n"})
    assert (done.returncode == 0) == alone == ("CI: all passed" in done.stdout), done.stdout + done.stderr
    made = [line for line in done.stdout.splitlines() if line.startswith("make ")]
    assert made[1:3] == ["make test", "make test ARGS=--last-failed --last-failed-no-failures none -n 0 -x"]
    assert len(made) == 3 + alone
