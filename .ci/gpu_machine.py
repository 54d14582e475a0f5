"""What the machine of ``make gpu`` is, and what it lacks. Standard library only."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

PYTHON = ((3, 11), (3, 12))
TORCH = ((2, 11), (2, 15))
_ASK = """
import json, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
try:
    import triton
except ImportError:
    triton = None
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton and triton.__version__, "gpu": gpu and gpu.name,
    "capability": gpu and f"{gpu.major}.{gpu.minor}", "memory_gib": gpu and round(gpu.total_memory / 2**30), "gpus": gpu and torch.cuda.device_count(),
}))
"""
_DRIVER = Path("/proc/driver/nvidia/version")


def machine(device: str) -> tuple[dict[str, Any], list[str]]:
    """Facts of this machine, and notes on what is odd about it. torch is asked in a process of its own, as it may fail to start."""
    from infra.repository import commit

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "commit": commit(),
        "compiler": _compiler(),
        "python_h": _has_headers(),
        "driver": _driver(),
    }
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=120)
        said = done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired:
        return found, ["torch cannot be imported here within 120 s: nothing can run."]
    if done.returncode:
        return found, [f"torch cannot be imported here: nothing can run. {' '.join(said)}"]
    found |= json.loads(done.stdout.strip().splitlines()[-1])
    notes = []
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        notes.append(f"Python {found['python']} is outside of the range that is supported, 3.{PYTHON[0][1]} to 3.{PYTHON[1][1]}.")
    version = tuple(int(part) for part in re.findall(r"\d+", found["torch"])[:2])
    if not TORCH[0] <= version <= TORCH[1]:
        notes.append(f"torch {found['torch']} is outside of the range that is supported, {TORCH[0][0]}.{TORCH[0][1]} to {TORCH[1][0]}.{TORCH[1][1]}.")
    if device == "cuda" and found["gpu"] is None:
        notes.append("torch sees no GPU: nothing can run. --device cpu rehearses.")
    if device == "cuda" and not (found["compiler"] and found["python_h"]):
        lacks = [*([] if found["compiler"] else ["a C compiler"]), *([] if found["python_h"] else ["Python.h"])]
        x, y = sys.version_info[:2]
        notes.append(
            f"Triton needs {' and '.join(lacks)}, which {'are' if len(lacks) > 1 else 'is'} not here: attention, kernel and all that compiles will fail. "
            f"apt-get install gcc python{x}.{y}-dev, or CC=/path/to/a/compiler."
        )
    return found, notes


def _compiler() -> str | None:
    """The C compiler that Triton would take, with the first line of what it says of itself."""
    name = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not name:
        return None
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [name])[0] if done.returncode == 0 else None


def _has_headers() -> bool:
    """Whether Python.h is where Triton looks for it."""
    return Path(sysconfig.get_paths()["include"], "Python.h").exists()


def _driver() -> str | None:
    """Version of NVIDIA's driver, from the kernel module or, in a container without it, from nvidia-smi."""
    try:
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", _DRIVER.read_text())
        if found:
            return found[1]
    except OSError:
        pass
    try:
        words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.strip().splitlines() or [None])[0] if done.returncode == 0 else None
