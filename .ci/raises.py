"""``make raises``: run the tests under coverage, and list every ``raise`` that no test reached. Exit code 1 if there is one.

A bare ``raise`` (passing on what came) and lines marked ``pragma: no cover`` do not count.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("infra", "model", "data_pipeline", "train")
CONFIG = """[run]
branch = False
parallel = True
sigterm = True
patch = subprocess, fork, _exit
source = infra, model, data_pipeline, train
data_file = {folder}/data
"""


def raises(path: Path) -> list[int]:
    """Lines of the raise statements of a file."""
    text = path.read_text()
    lines = text.splitlines()
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise) and node.exc is not None]
    return sorted(node.lineno for node in found if "pragma: no cover" not in lines[node.lineno - 1])


def main(arguments: list[str]) -> int:
    """Run pytest with ``arguments`` under coverage and print what was missed."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "coveragerc")
        config.write_text(CONFIG.format(folder=folder))
        tool = [sys.executable, "-m", "coverage"]
        code = subprocess.run([*tool, "run", f"--rcfile={config}", "-m", "pytest", *arguments], cwd=ROOT, check=False).returncode
        subprocess.run([*tool, "combine", "-q", f"--rcfile={config}"], cwd=ROOT, check=True)
        subprocess.run([*tool, "json", "-q", f"--rcfile={config}", "-o", f"{folder}/report.json"], cwd=ROOT, check=True)
        hit = {name: set(entry["executed_lines"]) for name, entry in json.loads(Path(folder, "report.json").read_text())["files"].items()}
    total, missed = 0, []
    for place in FOLDERS:
        for path in sorted((ROOT / place).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for line in raises(path):
                total += 1
                if line not in hit.get(name, set()):
                    missed.append(f"{name}:{line}: {path.read_text().splitlines()[line - 1].strip()}")
    print("\n".join(missed))
    print(f"{total - len(missed)} of {total} raise statements were reached by a test")
    return code or bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
