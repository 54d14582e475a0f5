"""Files and functions stay small enough to be read in one sitting (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.root import ROOT

FILE_LINES, FUNCTION_LINES = 400, 60


def ours() -> list[Path]:
    """All Python files of the checkout."""
    folders = ("model", "data_pipeline", "train", "infra", "tests", ".ci")
    return [ROOT / "launcher.py", *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))]


def long_functions(text: str) -> list[tuple[str, int]]:
    """Functions of more lines than allowed, decorators left out."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in nodes]
    return [(name, lines) for name, lines in sizes if lines > FUNCTION_LINES]


def test_no_file_is_longer_than_400_lines() -> None:
    sizes = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in ours()}
    assert not (long := {name: lines for name, lines in sizes.items() if lines > FILE_LINES}), f"split by what they are about: {long}"


def test_no_function_is_longer_than_60_lines() -> None:
    found = {str(path.relative_to(ROOT)): long for path in ours() if (long := long_functions(path.read_text()))}
    assert not found, found


def test_a_long_function_is_seen() -> None:
    assert long_functions("def short():\n    pass\n\ndef long():\n" + "    x = 1\n" * 60) == [("long", 61)]
