"""Write constraints.txt from a fresh environment: .ci/freeze.py PYTHON (that of an environment of requirements.txt, -dev and -tools, with a CUDA build of torch).

It records which CUDA torch was built with: infra/docker/images.lock and the Dockerfile must name the same, and the image's last step checks it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "constraints.txt"
HEAD = """\
# One exact set of versions, frozen from a fresh environment of requirements.txt and requirements-dev.txt on Linux x86-64 (Python 3.11 and 3.12).
# `make` installs with it; pip install -r requirements.txt alone takes any versions in the ranges. A constraint installs nothing by itself.
# NVIDIA's packages and triton are left out: torch's CUDA build pins each of them exactly, and its CPU build needs none. Written by .ci/freeze.py.
# torch.version.cuda: {cuda}
"""
LEFT_OUT = re.compile(r"nvidia-|cuda-|triton$|pip$")
"""pip is the environment's own."""


def frozen(packages: str, cuda: str) -> str:
    """The file's text, from ``pip list --format=freeze`` and torch's CUDA.

    Raises:
        SystemExit: torch was built without CUDA.
    """
    if cuda in ("", "None"):
        raise SystemExit("freeze.py: this torch is a CPU build; freeze an environment with the CUDA build, which the images take.")
    pairs = [line.split("==", 1) for line in packages.split() if "==" in line]
    lines = sorted(f"{name.lower()}=={version.split('+')[0]}" for name, version in pairs if not LEFT_OUT.match(name.lower()))
    return HEAD.format(cuda=cuda) + "\n".join(lines) + "\n"


def main(python: str) -> None:
    """Ask the environment and write the file."""
    packages = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True).stdout
    ask = [python, "-c", "import torch; print(torch.version.cuda)"]
    TARGET.write_text(frozen(packages, subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()))


if __name__ == "__main__":
    main(sys.argv[1])
