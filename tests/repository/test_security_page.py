"""Every line of docs/security.md names tests that exist."""

from __future__ import annotations

import ast
import re

from tests.support.root import ROOT

ROWS = [
    line for line in (ROOT / "docs" / "security.md").read_text().splitlines() if line.startswith("| ") and not line.startswith(("| what |", "|---"))
]


def test_every_line_of_the_page_names_tests_that_exist() -> None:
    assert len(ROWS) >= 20
    for row in ROWS:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row.split("|")[-2])
        assert named, f"names no test: {row[:80]}"
        for file, test in named:
            tree = ast.parse((ROOT / file).read_text())
            assert test in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file} has no {test}"
