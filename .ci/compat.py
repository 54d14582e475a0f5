"""Run the tests against the lowest and the highest supported versions, each in a fresh environment; prints a table. Usage: make compat.

The lowest are the lower bounds of requirements.txt themselves (``torch>=2.11`` becomes ``torch==2.11.0``), the highest are what pip picks
within the ranges, with no constraints. About 15 minutes on 2 cores and 12 GB of disk while it runs. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("torch", "deepspeed", "mosaicml-streaming", "numpy", "boto3", "sentencepiece", "pydantic", "typer")


def lower_bounds(requirements: str) -> list[str]:
    """``name>=1.2,<3`` -> ``name==1.2.0`` (padded to three numbers, as packages are numbered), for every line that has a lower bound.

    Raises:
        ValueError: a line has no lower bound.
    """
    pins = []
    for line in requirements.splitlines():
        words = line.split("#")[0].strip()
        if not words:
            continue
        found = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+),<[0-9.]+", words)
        if not found:
            raise ValueError(f"requirements: '{words}' is not of the form name>=lowest,<first-unsupported")
        pins.append(f"{found[1]}=={'.'.join([*found[2].split('.'), '0', '0'][:3])}")
    return pins


def run(name: str, pins: list[str], pytest_args: list[str]) -> tuple[str, str, str, bool]:
    """Install into ``.venv-compat-<name>``, run the tests, remove the environment; returns versions, result, time and whether all passed."""
    folder = ROOT / f".venv-compat-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    try:
        python = str(folder / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = folder / "pins.txt"
        constraints.write_text("\n".join(pins) + "\n")
        files = ["-r", "requirements.txt", "-r", "requirements-dev.txt", "-c", str(constraints)]
        print(f"compat: installing the {name} versions (some minutes)", flush=True)
        installed = subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *files], cwd=ROOT)
        if installed.returncode:
            return "", "cannot be installed", _minutes(start), False
        versions = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
        pairs = dict(line.split("==", 1) for line in versions.splitlines() if "==" in line)
        tests = subprocess.run(
            [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder", *pytest_args],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(tests.stdout, flush=True)
        summary = (tests.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
        return ", ".join(f"{key} {pairs.get(key, '?')}" for key in SHOWN), summary, _minutes(start), tests.returncode == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _minutes(start: float) -> str:
    return f"{(time.monotonic() - start) / 60:.1f} min"


def main() -> int:
    """Run both ends, or the one that is named; further words go to pytest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["lowest", "highest"])
    options, pytest_args = parser.parse_known_args()
    pins = {"lowest": lower_bounds((ROOT / "requirements.txt").read_text()), "highest": []}
    rows = [(name, *run(name, pins[name], pytest_args)) for name in pins if options.only in (None, name)]
    print(f"compat on Python {sys.version.split()[0]}:")
    for name, versions, summary, minutes, passed in rows:
        print(f"  {name:8}{'pass' if passed else 'FAIL':6}{minutes:>9}  {summary}\n                {versions}")
    return 0 if all(row[-1] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
