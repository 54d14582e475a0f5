"""FlexAttention on GPUs without one: the kernels that torch generates become machine code, and compute what the dense engine does. About 40 s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.support.root import ROOT

pytest.importorskip("triton")

from train.bench.kernels import TARGETS, dvae_row, flex_row

_LOCKED = f"torch=={torch.__version__.partition('+')[0]}\n" in (ROOT / "constraints.txt").read_text()
pytestmark = pytest.mark.skipif(not _LOCKED, reason="private parts of torch, known for the locked version alone")

_SHARED = {80: 166912, 90: 232448, 100: 232448}
"""Bytes that a block may have."""
MOST_SPILLS = 1024
"""Bytes of a thread. Of 255 registers the forward kernels use all, and that of the transposed mask some more."""


def python(*words: str, **variables: str) -> Any:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ | variables, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def of_line(line: str) -> dict[str, Any]:
    cells = line.strip("| ").replace(",", "").split(" | ")
    return {"kind": cells[0], "pass": cells[1], "target": int(cells[2].removeprefix("sm_"))} | dict(
        zip(("registers", "spills", "shared", "cubin"), map(int, cells[3:]), strict=True)
    )


def test_the_table_has_every_mask_pass_and_target_within_what_the_gpu_has() -> None:
    section = (ROOT / "docs" / "kernels.md").read_text().partition("## FlexAttention")[2].partition("\n## ")[0]
    found = [of_line(line) for line in section.splitlines() if " | sm_" in line]
    assert len(found) == 2 * 3 * len(TARGETS) == len({(row["kind"], row["pass"], row["target"]) for row in found})
    assert all(row["shared"] <= _SHARED[row["target"]] and row["spills"] <= MOST_SPILLS for row in found)


def test_machine_code_is_made_of_what_torch_generates() -> None:
    found: list[Mapping[str, Any]] = python("-m", "train.bench.flex_kernels", "90", "column")
    assert [row["pass"] for row in found] == ["forward", "backward"]
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert all(flex_row(row) in page for row in found), "python -m train.bench.kernels makes the table anew"


def test_the_dvaes_groups_become_machine_code_too() -> None:
    found: list[Mapping[str, Any]] = python("-m", "train.bench.dvae_kernels", "90")
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert len(found) == 4 and all(dvae_row(row) in page for row in found), "python -m train.bench.kernels makes the table anew"
    assert all(row["kernels"] > 3 and row["spills"] == 0 and row["registers"] <= 64 for row in found)


def test_the_generated_kernels_compute_attention_and_its_gradients() -> None:
    words = ("row:float32", "column:float16", "conv:float32")
    found = python("-m", "tests.support.interpreted_flex", *words, TRITON_INTERPRET="1")
    for word in words:
        assert set(found[word]) == {"out", "dq", "dk", "dv"}
        assert all(0 < difference < (5e-6 if "32" in word else 5e-3) for difference in found[word].values()), (word, found[word])
