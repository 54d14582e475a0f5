"""What a real SLURM did to real jobs, as a table: ``python -m tests.support.slurm_faults`` runs tests/infra/test_slurm_real.py and writes docs/slurm_faults.md.

Options of pytest may follow (``-k limit``): rows of tests that do not run stay as they are.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any, cast

import pytest

from tests.support.root import ROOT

PAGE = ROOT / "docs" / "slurm_faults.md"
TITLE = f"""# What comes of faults on a real SLURM

Made by `python -m tests.support.slurm_faults`: SLURM 22.05 with three nodes on one machine of {os.cpu_count()} cores, the job scripts of `infra/slurm/`, the preset tiny. Do not edit.
`tests/infra/test_slurm_real.py` checks the same outcomes. Seconds run from the fault (or the submission) to the outcome; most of them start Python, the wait of a requeued job (6 s),
the look at limits (every 30 s) and the loss of a node (50 s) are SLURM's. Load is what else the machine did: processes that wanted to run, on average of a quarter of an hour.

| fault or command | outcome | s | load |
|---|---|---|---|
"""


class _Rows:
    """What the tests record about each fault."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for what, found in report.user_properties:
                outcome, seconds = cast("list[Any]", found)
                self.found[what] = f"| {what} | {outcome} | {seconds} | {os.getloadavg()[2]:.0f} |"


def main(options: list[str]) -> int:
    """Run the tests and write the rows of those that passed."""
    rows = _Rows()
    before = PAGE.read_text() if PAGE.exists() else TITLE
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines() if re.match(r"\| .* \| \d+ \| \d+ \|$", line)}
    code = pytest.main([str(ROOT / "tests" / "infra" / "test_slurm_real.py"), "-q", "-m", "", *options], [rows])
    if rows.found:
        PAGE.write_text(TITLE + "\n".join((kept | rows.found).values()) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
