"""Seconds that each file of tests takes, recorded by ``make test ARGS=--record-durations``: the order in which workers take files."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest

from tests.support.root import ROOT

RECORD = ROOT / "tests" / "durations.json"


def slowest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """The tests by their file's recorded seconds; files without a record come first. Within a file the order stays."""
    seconds = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    return sorted(items, key=lambda item: -seconds.get(item.nodeid.partition("::")[0], float("inf")))


class Recorder:
    """A plugin that adds up what tests took, and writes the record at the end. Files that did not run keep theirs while they exist."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown of each test, as workers report them."""
        self._seconds[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        old = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        kept = {name: seconds for name, seconds in old.items() if (ROOT / name).exists()}
        found = kept | {name: round(seconds, 1) for name, seconds in self._seconds.items()}
        RECORD.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
