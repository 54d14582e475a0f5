"""The compiled update on a CPU against torch's operations, bit for bit: on what lengths, values and processors so ever."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.root import ROOT
from train.bench import plain_adamw
from train.optimizer import adamw_cpu
from train.optimizer.adamw import Hyper, update
from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, clip_variance=5.0, factor=0.3, count=3)
ODD = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-42, 3.4e38, -1e-20, 2.0**-60, 16.0, 15.99]
"""NaN, Inf, subnormal numbers, what a square overflows, and the ends of the 16-bit formats."""
LENGTHS = [1, 3, 7, 8, 15, 17, 255, adamw_cpu.CHUNK - 1, adamw_cpu.CHUNK + 17, 3 * adamw_cpu.CHUNK + 5]


def tensors(n: int, packed: bool, dtype: torch.dtype) -> list[Tensor]:
    """Master, gradient and moments, odd values in each at both ends and against each odd value of the others."""
    generator = torch.Generator().manual_seed(n)
    p, g, m, v = (torch.randn(n, generator=generator) * scale for scale in (1.0, 30.0, 1.0, 2.0))
    odd = torch.tensor(ODD)
    for turn, t in enumerate((p, g, m, v)):
        for start in range(turn * len(ODD), min(n, 4 * len(ODD) ** 2), 4 * len(ODD)):
            part = t[start : start + len(ODD)]
            part.copy_(odd.roll(start // len(ODD))[: len(part)])
        t[-len(ODD) :] = odd[: len(t[-len(ODD) :])].roll(turn)
    v = v.abs()
    return [p, g.to(dtype), *((SIGNED_169.encode(m), UNSIGNED_0610.encode(v)) if packed else (m, v))]


def bits(t: Tensor) -> Tensor:
    """One NaN for all: which of two makes a third, and its sign, nobody defines."""
    return (t.where(~t.isnan(), torch.nan) if t.is_floating_point() else t).view(torch.int32 if t.element_size() == 4 else torch.int16)


def differing(n: int, packed: bool, dtype: torch.dtype, hyper: Hyper, copies: bool) -> list[int]:
    """Of master, gradient, moments and copy: elements whose bits differ from those that torch's operations give, after two updates."""
    ours, theirs = tensors(n, packed, dtype), tensors(n, packed, dtype)
    copy = [torch.zeros(n, dtype=dtype) if copies else None for _ in "ab"]
    for count in (hyper.count, hyper.count + 1):
        update(ours[0], ours[1], ours[2], ours[3], replace(hyper, count=count), copy[0])
        plain_adamw.update(theirs[0], theirs[1], theirs[2], theirs[3], replace(hyper, count=count), copy[1])
    pairs = [*zip(ours, theirs, strict=True), *([(copy[0], copy[1])] if copies else [])]
    return [int((bits(a) != bits(b)).sum()) for a, b in pairs]  # type: ignore[arg-type]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n", LENGTHS)
def test_every_bit_is_that_of_torchs_operations(n: int, packed: bool) -> None:
    assert set(differing(n, packed, torch.float32, HYPER, copies=False)) == {0}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_and_copies_of_every_dtype_give_the_same_bits(dtype: torch.dtype, packed: bool) -> None:
    assert set(differing(1001, packed, dtype, HYPER, copies=True)) == {0}


@pytest.mark.parametrize(
    "change", [{"beta1": 0.0}, {"beta1": 0.4}, {"beta1": 0.999, "beta2": 0.999}, {"clip_variance": float("inf")}, {"factor": 2.0**-13}]
)
def test_other_numbers_give_the_same_bits(change: dict[str, float]) -> None:
    """Below a beta1 of 0.5 torch interpolates from the other end."""
    for packed in (False, True):
        assert set(differing(1001, packed, torch.float32, replace(HYPER, **change), copies=False)) == {0}  # type: ignore[arg-type]


def test_threads_change_no_bit() -> None:
    n = adamw_cpu._SHARED + 4321
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            given = tensors(n, True, torch.float32)
            update(given[0], given[1], given[2], given[3], HYPER)
            found.append(given)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(*found, strict=True))


_ELSEWHERE = """
from tests.train.optimizer.test_adamw_cpu import HYPER, LENGTHS, differing
import torch
print(torch.backends.cpu.get_cpu_capability(), sum(sum(differing(n, packed, torch.float32, HYPER, False)) for n in LENGTHS[-4:] for packed in (False, True)))
"""


def test_every_bit_is_the_same_without_avx_512_and_where_no_cache_can_be_written(tmp_path: Path) -> None:
    if "AVX2" not in torch.backends.cpu.get_cpu_capability() and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("a processor without AVX2")
    (tmp_path / "file").touch()
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c"}
    environment |= {"NUMBA_CACHE_DIR": str(tmp_path / "file" / "none"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _ELSEWHERE], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.split() == ["AVX2", "0"], done.stderr[-3000:]
