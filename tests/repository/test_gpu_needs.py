"""What each step of ``make gpu`` needs: its code is imported where nothing else is installed, and imports each package that is named. About 90 s."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from tests.support.root import ROOT

LATE = {
    ("kernel", "cpu"): ("train.optimizer.adamw_cpu", "train.optimizer.adamw_loops"),
    ("zero", "cpu"): ("train.engines.zero.construction", "train.engines.zero.engine", "train.optimizer.adamw_loops"),
    ("zero", "cuda"): ("train.engines.zero.construction", "train.engines.zero.engine", "train.optimizer.adamw_loops"),
    ("bench optimizer", "cpu"): ("train.optimizer.adamw_cpu", "train.optimizer.adamw_loops"),
    ("bench sample", "cpu"): ("train.drawing.cpu_drawer",),
    ("bench model", "cuda"): ("train.bench.model_cuda", "train.bench.training_step"),
    ("bench checkpoint", "cpu"): ("train.engines.zero.engine", "train.optimizer.adamw_loops"),
    ("bench checkpoint", "cuda"): ("train.engines.zero.engine",),
}
"""What a step imports while it runs, on each device. On a GPU numba is for masters that are offloaded to CPU memory."""

SCRIPT = """
import builtins, importlib, importlib.machinery, json, sys
given = json.loads(sys.argv[1])
hidden, named, plain = set(given["hidden"]), set(), builtins.__import__

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else super().find_spec(name, path, target)

def noted(name, globals=None, locals=None, fromlist=(), level=0):
    if globals and str(globals.get("__name__")).partition(".")[0] in given["ours"] and not level:
        named.add(name.partition(".")[0])
    return plain(name, globals, locals, fromlist, level)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
builtins.__import__ = noted
for module in given["modules"]:
    importlib.import_module(module)
print(json.dumps(sorted(named)))
"""


def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_script_for_needs", ROOT / ".ci" / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def modules_of(step: Any, device: str) -> list[str]:
    own = [word.removesuffix(".py").replace("/", ".") for word in step.command if word.startswith("tests/")] or [step.command[1]]
    return [*own, *LATE.get((step.name, device), ())]


def closure(names: tuple[str, ...]) -> set[str]:
    """Distributions that come with these."""
    found: set[str] = set()
    left = [*names]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in found:
            continue
        found.add(name)
        try:
            left += [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in metadata.requires(name) or [] if "extra" not in line]
        except metadata.PackageNotFoundError:
            continue
    return found


GROUPS: dict[tuple[str, ...], list[tuple[str, tuple[str, ...]]]] = {}
"""Needs -> names of steps with their modules. Steps with the same needs share a process."""
for _step in script().STEPS:
    for _device in ("cuda", "cpu"):
        GROUPS.setdefault(tuple(sorted(_step.needed(_device))), []).append((f"{_step.name} on {_device}", tuple(modules_of(_step, _device))))


@pytest.mark.parametrize("needs", GROUPS, ids=lambda needs: " ".join(needs) or "torch alone")
def test_steps_run_with_the_packages_that_they_name_and_import_each(needs: tuple[str, ...]) -> None:
    there = closure(("torch", "setuptools", *needs)) | ({"triton"} if importlib.util.find_spec("triton") else set())
    if "torch" not in needs and not {"numpy"} & set(needs):
        there -= {"numpy"}
    by_module = metadata.packages_distributions()
    ours = ("infra", "model", "train", "data_pipeline", "tests")
    hidden = [m for m, names in by_module.items() if m not in ours and not {re.sub(r"[-_.]+", "-", name).lower() for name in names} & there]
    modules = list(dict.fromkeys(module for _, of in GROUPS[needs] for module in of))
    words = [sys.executable, "-c", SCRIPT, json.dumps({"hidden": hidden, "ours": ours, "modules": modules})]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, f"{[name for name, _ in GROUPS[needs]]} need more than {needs}:\n{done.stderr[-2000:]}"
    assert set(needs) <= set(json.loads(done.stdout.splitlines()[-1])), "a package that is named is not imported by our code"
