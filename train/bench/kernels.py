"""Compiles our Triton kernels for real GPUs, without having one. Shows registers, spills and shared memory as NVIDIA's assembler counts them.
``python -m train.bench.kernels``"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from infra.repository import DOCS, REPOSITORY
from train.optimizer import adamw_kernel
from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610

TARGETS = (80, 90, 100)
"""Compute capabilities: A100, H100 and H200, B200."""
GRADIENTS = {"fp32": "*fp32", "fp16": "*fp16"}
"""Dtypes of gradients after the reduction; with bf16 products they are fp32."""
_WARP = 32


@dataclass(frozen=True)
class Variant:
    """One kernel as it is launched."""

    moments: str
    """'fp32' or '16-bit'."""
    gradient: str
    """One of GRADIENTS. If a copy of the master weights is written, it has the same dtype."""
    copies: bool
    """Whether a copy of the master weights is written."""
    pieces: bool = False
    """Whether the gradient is in pieces."""

    def __str__(self) -> str:
        return f"AdamW, {self.moments} moments, {self.gradient} gradients{' in pieces' * self.pieces}{', with a copy' * self.copies}"

    def source(self) -> ASTSource:
        """The input of Triton's compiler: the types of the arguments, and the constants."""
        packed = self.moments == "16-bit"
        codes, dtype = "*i16" if packed else "*fp32", GRADIENTS[self.gradient]
        pointers = {"p_ptr": "*fp32", "grad_ptr": dtype, "mean_ptr": codes, "variance_ptr": codes, "copy_ptr": dtype if self.copies else "*fp32"}
        pointers |= {"table_ptr": "*i64", "owner_ptr": "*i32"} if self.pieces else {}
        numbers = ("factor", "decay", "step", "inverse_correction", "beta1", "beta2", "eps", "clip")
        constants: dict[str, Any] = dict(zip(("m_largest", "m_smallest"), (SIGNED_169.largest, SIGNED_169.smallest), strict=True))
        constants |= dict(zip(("v_largest", "v_smallest"), (UNSIGNED_0610.largest, UNSIGNED_0610.smallest), strict=True))
        constants |= {"packed": packed, "copies": self.copies, "block": adamw_kernel._BLOCK} | ({"aligned": True} if self.pieces else {})
        signature = {**pointers, **({} if self.pieces else {"n": "i32"}), **dict.fromkeys(numbers, "fp32"), **dict.fromkeys(constants, "constexpr")}
        aligned = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}  # the alignment of memory that torch allocates
        kernel = adamw_kernel._pieces_kernel if self.pieces else adamw_kernel._kernel
        return ASTSource(kernel, signature, constexprs=constants, attrs=aligned)


VARIANTS = tuple(
    Variant(moments, gradient, copies, pieces)
    for moments in ("fp32", "16-bit")
    for gradient in GRADIENTS
    for copies, pieces in ((False, False), (True, False), (True, True))
)


@dataclass(frozen=True)
class Usage:
    """The resources of a GPU that a kernel uses."""

    registers: int
    """Registers of a thread."""
    spills: int
    """Bytes that a thread stores to and loads from memory because its registers are not enough."""
    shared: int
    """Bytes of shared memory of a block."""
    cubin: int
    """Bytes of the machine code."""


def compiled(variant: Variant, capability: int) -> Usage:
    """Compile a kernel for a compute capability, down to machine code. Needs no GPU."""
    kernel = triton.compile(variant.source(), target=GPUTarget("cuda", capability, _WARP), options=adamw_kernel.OPTIONS)
    return usage(kernel)


def usage(kernel: Any) -> Usage:
    """What a compiled kernel uses."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        architecture = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])
        assert architecture is not None
        words = [_assembler(), "-v", f"--gpu-name={architecture[1]}", str(ptx), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    spills = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    return Usage(int(registers[1]), spills, int(kernel.metadata.shared), len(kernel.asm["cubin"]))


def _assembler() -> str:
    """The path of ptxas, which comes with Triton's wheel."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return str(next(path for name in ("ptxas-blackwell", "ptxas") if (path := folder / name).exists()))


_HEAD = f"""# Kernels

Made by `python -m train.bench.kernels`, which compiles every Triton kernel of ours for {", ".join(f"sm_{target}" for target in TARGETS)} (A100; H100 and H200; B200) without a GPU,
and reads what NVIDIA's assembler says of it. Do not edit. A block is {adamw_kernel._BLOCK} elements in 4 warps. Bounds: tests/train/bench/test_kernels.py.

"""


_FLEX_HEAD = f"""## FlexAttention

What torch {torch.__version__.split("+")[0]} generates for the attention of a layer at the paper's stream (256 + 1,024 states, heads of 64, fp16), compiled in the same way (`python -m train.bench.flex_kernels`); torch takes these sizes of
blocks without trying others. Their numbers, forward and backward, are compared with the dense engine by Triton's interpreter (tests/train/bench/test_flex_kernels.py).
"""


_DVAE_HEAD = """
## Groups of the dVAE

What torch generates for a group of residual blocks that `dvae_fit.compile` compiles (the second of each half, released sizes, 256 pixels, 4 pictures, fp16 products; `python -m train.bench.dvae_kernels`): everything but the convolutions, which are cuDNN's. The most that any of the kernels uses.
"""


def row(variant: Variant, capability: int) -> str:
    """A line of the table."""
    found = compiled(variant, capability)
    return f"| {variant} | sm_{capability} | {found.registers} | {found.spills} | {found.shared} | {found.cubin:,} |"


def page() -> str:
    """All kernels for all targets, as docs/kernels.md shows them."""
    lines = [
        f"Triton {triton.__version__}.",
        "",
        "| kernel | target | registers | spills, bytes | shared memory, bytes | machine code, bytes |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for variant in VARIANTS:
        for capability in TARGETS:
            lines.append(row(variant, capability))
    lines += ["", *_generated_section()]
    return _HEAD + "\n".join(lines) + "\n"


def _generated_section() -> list[str]:
    """The kernels that torch generates, each target's made in a process of its own (train/bench/generated.py)."""
    lines = [
        _FLEX_HEAD,
        "| mask | pass | target | registers | spills, bytes | shared memory, bytes | machine code, bytes |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    lines += [flex_row(found) for capability in TARGETS for found in _told("flex_kernels", capability)]
    lines += [
        _DVAE_HEAD,
        "| half | pass | target | kernels | registers | spills, bytes | shared memory, bytes |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    return lines + [dvae_row(found) for capability in TARGETS for found in _told("dvae_kernels", capability)]


def _told(module: str, capability: int) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", f"train.bench.{module}", str(capability)]
    found: list[dict[str, Any]] = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout)
    return found


def dvae_row(found: Mapping[str, Any]) -> str:
    """A line of the table of the dVAE's groups."""
    return f"| {found['half']} | {found['pass']} | sm_{found['target']} | {found['kernels']} | {found['registers']} | {found['spills']} | {found['shared']} |"


def flex_row(found: Mapping[str, Any]) -> str:
    """A line of the table of FlexAttention."""
    first = f"| {found['kind']} | {found['pass']} | sm_{found['target']} | {found['registers']} | {found['spills']} | "
    return f"{first}{found['shared']} | {found['cubin']:,} |"


if __name__ == "__main__":
    (DOCS / "kernels.md").write_text(page())
