"""What the code and the documents cite exists: files by their path, and sections of docs/paper.md by their number."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.support.root import ROOT

FOLDERS = ("docs", "train", "model", "data_pipeline", "infra", "tests", r"\.ci", r"\.github")
CITED = re.compile(
    rf"(?<![\w/.*<{{}}-])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|md|toml|json|sh|txt|sbatch|yaml|yml|svg|png|css)|[A-Za-z_]+\.md)\b(?![\w*]|\.\w)"
)
SECTION = re.compile(r"docs/paper\.md (\d+(?:\.\d+)?)(?:(?:,| and) (\d+(?:\.\d+)?))?")
# Examples of names in texts and tests, and what a run writes.
EXAMPLES = (
    "docs/experiments/NAME.json",
    "docs/experiments/against-dalle-pytorch-NAME.json",
    "docs/experiments/sweep-NAME.json",
    "infra/slurm/STAGE.sbatch",
    "train/mid.py",
)


def cited(text: str) -> set[str]:
    """Paths of files that a text names; patterns (``*``, ``<name>``) are none."""
    return set(CITED.findall(text))


def dangling(path: Path, text: str) -> list[str]:
    """What a file cites and is not there: from the root, beside the file, or as a document anywhere in docs/."""
    return sorted(
        name for name in cited(text) if name not in EXAMPLES and not any((base / name).exists() for base in (ROOT, path.parent, ROOT / "docs"))
    )


def tracked() -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    kept = [
        name
        for name in names
        if name.endswith((".py", ".md", ".toml", ".yaml", ".sh", ".sbatch")) or Path(name).name in ("Makefile", "run", "Dockerfile")
    ]
    return [ROOT / name for name in kept if (ROOT / name).is_file() and name != "CHANGELOG.md"]  # history names files of its day


def test_every_cited_file_exists() -> None:
    wrong = [f"{path.relative_to(ROOT)} cites {name}" for path in tracked() if path != Path(__file__) for name in dangling(path, path.read_text())]
    assert not wrong, "\n".join(wrong)


def test_every_cited_section_of_the_paper_page_exists() -> None:
    page = (ROOT / "docs" / "paper.md").read_text()
    numbers = set(re.findall(r"^#+ (\d+(?:\.\d+)?)\.? ", page, re.M)) | set(re.findall(r"\b(10\.\d|2\.4)\b", page))
    for path in tracked():
        for found in SECTION.findall(path.read_text()):
            assert {number for number in found if number} <= numbers, f"{path.relative_to(ROOT)} cites docs/paper.md {found}"


def test_a_dangling_citation_is_seen() -> None:
    assert dangling(ROOT / "README.md", "see docs/no_such_page.md and train/loop/trainer.py, missing.md") == ["docs/no_such_page.md", "missing.md"]
    assert dangling(ROOT / "README.md", "`docs/benchmarks/*.json`, tests/test_*.py and train/<room>/x.py are patterns") == []
