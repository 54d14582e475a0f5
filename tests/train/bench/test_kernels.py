"""The fused kernel of AdamW without a GPU: machine code for those that we support, and its numbers through Triton's interpreter. About 15 s."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.root import ROOT

pytest.importorskip("triton")

import triton

from train.bench.kernels import TARGETS, VARIANTS, Usage, compiled

MOST_REGISTERS = 72
"""Of a thread: with 128 threads a block, 7 blocks are then at home on a multiprocessor of 65,536 registers, which hides the latency of memory."""
MOST_SHARED = 8192
PAGE = (ROOT / "docs" / "kernels.md").read_text()


def in_the_table(variant: object, capability: int) -> Usage:
    """What docs/kernels.md says of a kernel."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {variant} | sm_{capability} |"))
    return Usage(*(int(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[2:]))


def test_the_table_is_within_the_bounds_for_every_kernel_and_target() -> None:
    found = [in_the_table(variant, capability) for variant in VARIANTS for capability in TARGETS]
    assert max(f.spills for f in found) == 0 and max(f.registers for f in found) <= MOST_REGISTERS and max(f.shared for f in found) <= MOST_SHARED


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[-1]], ids=str)
def test_machine_code_takes_no_more_than_lets_a_multiprocessor_hide_its_memory(variant: object, capability: int) -> None:
    found = compiled(variant, capability)  # type: ignore[arg-type]
    assert found.spills == 0, found
    assert found.registers <= MOST_REGISTERS and found.shared <= MOST_SHARED and found.cubin > 4096, found
    if f"Triton {triton.__version__}." in PAGE:  # another one allots registers otherwise
        assert found == in_the_table(variant, capability), "python -m train.bench.kernels makes the table anew"


_NUMBERS = """
import torch
from dataclasses import replace
from tests.train.optimizer.test_adamw_cpu import HYPER, tensors
from train.bench import plain_adamw
from train.optimizer.adamw_kernel import update
odd = 0
for n, packed, dtype, clip in (
    (1, True, torch.float16, 5.0), (1, False, torch.float32, 5.0), (1025, False, torch.float32, float("inf")), (1025, True, torch.float32, 5.0),
    (1025, True, torch.float16, float("inf")), (1023, False, torch.bfloat16, 5.0), (1023, True, torch.bfloat16, 5.0),
):
    hyper = replace(HYPER, clip_variance=clip)
    a, b = tensors(n, packed, dtype), tensors(n, packed, dtype)
    copies = [torch.zeros(n, dtype=dtype) for _ in "ab"]
    plain_adamw.update(*a, hyper, copies[0])
    update(*b, hyper, copies[1])
    huge = a[0].abs() > 1e38  # of which the interpreter makes other 16-bit numbers than a GPU
    for x, y in zip((a[0], *a[2:], copies[0].where(~huge, 0)), (b[0], *b[2:], copies[1].where(~huge, 0))):
        where = (n, packed, dtype, clip)
        if x.dtype == torch.int16:
            far = ((x.int() & 0x7FFF) - (y.int() & 0x7FFF)).abs()
            assert int(far.max()) <= 1 and float((far > 0).float().mean()) < 0.02, (where, int(far.max()), float((far > 0).float().mean()))
        else:
            odd += int((~x.isfinite()).sum())
            near = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}[x.dtype]
            torch.testing.assert_close(y, x, rtol=near, atol=1e-6, equal_nan=True, msg=lambda m: f"{where}: {m}")
print("same", odd > 100)
"""


def test_every_dtype_odd_lengths_nan_and_inf_give_what_torchs_operations_give(tmp_path: Path) -> None:
    script = tmp_path / "interpreted.py"  # triton reads a kernel's source from its file
    script.write_text(_NUMBERS)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == ["same", "True"], done.stderr[-3000:]
