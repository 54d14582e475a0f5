"""The paper's AdamW against a reference written from its formulas in float64, with fp32 and 16-bit moments, on the CPU and through Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from tests.support.root import ROOT
from train.optimizer import apex_parts
from train.optimizer.adamw import Hyper, PaperAdamW, update
from train.optimizer.adamw_cpu import CHUNK
from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610, Format

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, clip_variance=5.0, factor=0.25, count=3)


def reference(p: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, h: Hyper) -> tuple[torch.Tensor, ...]:
    """(paper B.2) in float64; moments as values."""
    p, g, m, v = (t.double() for t in (p, grad, mean, variance))
    g = g * h.factor
    m = h.beta1 * m + (1 - h.beta1) * g
    v = torch.minimum(h.beta2 * v + (1 - h.beta2) * g**2, torch.tensor(h.clip_variance, dtype=torch.float64))
    step = (m / (1 - h.beta1**h.count)) / ((v / (1 - h.beta2**h.count)).sqrt() + h.eps)
    return p - h.lr * h.weight_decay * p - h.lr * step, m, v


def tensors(n: int, seed: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    return [p, g * scale, m * scale / 8, v.square() * scale**2 / 16]


@given(st.integers(0, 1000), st.sampled_from([1e-6, 1e-2, 1.0, 30.0]))
def test_an_update_is_that_of_the_paper(seed: int, scale: float) -> None:
    p, g, m, v = tensors(101, seed, scale)
    expected = reference(p, g, m, v, HYPER)
    update(p, g, m, v, HYPER)
    for found, wanted in zip((p, m, v), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=1e-6 * float(wanted.abs().max()))
    assert v.max() <= 5.0


@given(st.integers(0, 1000), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_packed_moments_are_the_rounded_ones(seed: int, scale: float) -> None:
    p, g, m, v = tensors(101, seed, scale)
    mean, variance = SIGNED_169.encode(m), UNSIGNED_0610.encode(v)
    expected = reference(p, g, SIGNED_169.decode(mean), UNSIGNED_0610.decode(variance), HYPER)
    update(p, g, mean, variance, HYPER)
    torch.testing.assert_close(p.double(), expected[0], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(SIGNED_169.decode(mean).double(), expected[1], rtol=2**-10, atol=1e-18)
    torch.testing.assert_close(UNSIGNED_0610.decode(variance).double(), expected[2], rtol=2**-11, atol=1e-18)


def apply(given: list[torch.Tensor]) -> None:
    p, grad, mean, variance = given
    update(p, grad, mean, variance, HYPER)


def test_chunks_change_nothing() -> None:
    whole, cut = tensors(CHUNK + 17, 1, 1.0), tensors(CHUNK + 17, 1, 1.0)
    apply(whole)
    for part in (slice(0, 1000), slice(1000, CHUNK + 17)):
        apply([t[part] for t in cut])
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_in_pieces_and_a_copy_give_the_same(dtype: torch.dtype) -> None:
    n = CHUNK + 33
    p, grad, _, _ = tensors(n, 3, 1.0)
    grad = grad.to(dtype)
    whole, cut, copy = torch.nn.Parameter(p.clone()), torch.nn.Parameter(p.clone()), torch.full((n,), 7.0, dtype=dtype)
    adams = [PaperAdamW([{"params": [q], "lr": 1e-2, "packed": True, "factor": 0.5}], betas=(0.9, 0.96)) for q in (whole, cut)]
    for _ in range(2):
        whole.grad = grad.float()
        adams[0].step()
        adams[1].apply(adams[1].param_groups[0], cut, [grad[:1000], grad[1000:]], copy)
    assert torch.equal(whole, cut) and torch.equal(copy, cut.to(dtype))
    for wrong in ([grad[:1000]], [grad, grad[:1]]):
        with pytest.raises(ValueError, match=rf"\d+ gradients for {n} parameters"):
            adams[1].apply(adams[1].param_groups[0], cut, wrong, copy)
    adams[1].param_groups[0]["skip"] = True
    before = cut.clone()
    adams[1].apply(adams[1].param_groups[0], cut, [grad], copy)
    assert torch.equal(cut, before)


def test_it_is_torchs_adamw_where_nothing_is_clipped() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.arange(12.0)) for _ in range(2))
    paper = PaperAdamW([{"params": [ours], "weight_decay": 0.1}], betas=(0.9, 0.96))
    plain = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.96), weight_decay=0.1)
    for step in range(1, 20):
        ours.grad = torch.randn(12)
        theirs.grad = ours.grad.clone()
        paper.count, paper.param_groups[0]["lr"] = step, 1e-2
        paper.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_groups_are_scaled_skipped_and_packed_each_for_itself() -> None:
    ps = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    for p in ps:
        p.grad = torch.full((4,), 8.0)
    adam = PaperAdamW(
        [{"params": [ps[0]], "factor": 0.5}, {"params": [ps[1]], "skip": True}, {"params": [ps[2]], "packed": True}],
        betas=(0.9, 0.96),
        clip_variance=None,
    )
    adam.step()
    assert torch.equal(ps[1], torch.ones(4)) and ps[1] not in adam.state
    assert adam.state[ps[0]]["exp_avg"][0] == pytest.approx(0.4) and adam.state[ps[0]]["exp_avg_sq"][0] == pytest.approx(0.04 * 16)
    assert adam.state[ps[2]]["exp_avg"].dtype == adam.state[ps[2]]["exp_avg_sq"].dtype == torch.int16
    assert SIGNED_169.decode(adam.state[ps[2]]["exp_avg"])[0] == pytest.approx(0.8, rel=1e-3)


def edges(fmt: Format) -> torch.Tensor:
    """Every value halfway between two neighbouring codes, and the floats beside it: what tells a rounding from any other."""
    codes = torch.arange(1, 1 << 15 if fmt.signed else 1 << 16, dtype=torch.int32)
    halfway = ((codes + fmt.rebias) << fmt.shift) + (1 << (fmt.shift - 1))  # bits of float32
    values = torch.cat([halfway - 1, halfway, halfway + 1]).view(torch.float32)
    return torch.nn.functional.pad(torch.cat([values, -values]), (0, -2 * values.numel() % 1024))


_INTERPRETED = """
import torch
from tests.train.optimizer.test_adamw import HYPER, edges, tensors
from train.optimizer.adamw import update
from train.optimizer import adamw_kernel
from train.optimizer.adamw_kernel import update as fused, update_pieces as fused_pieces
from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610
for scale in (1e-3, 1.0, 30.0):
    for packed in (False, True):
        for grad in (torch.float32, torch.float16):
            a, b = tensors(1500, 5, scale), tensors(1500, 5, scale)
            for t in (a, b):
                t[1] = t[1].to(grad)
                t[2][0], t[3][:2] = 0.0, 0.0
                if packed:
                    t[2], t[3] = SIGNED_169.encode(t[2]), UNSIGNED_0610.encode(t[3])
            copies = [torch.zeros(1500, dtype=grad) for _ in "ab"]
            update(*a, HYPER, copies[0])
            fused(*b, HYPER, copies[1])
            assert torch.equal(copies[1], b[0].to(grad)) and torch.equal(copies[0], a[0].to(grad))
            torch.testing.assert_close(b[0], a[0], rtol=1e-5, atol=1e-6)
            for x, y in zip(a[2:], b[2:]):
                if packed:
                    assert ((x.int() & 0x7FFF) - (y.int() & 0x7FFF)).abs().max() <= 1
                else:
                    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6 * float(x.abs().max()))
for lengths in ((1024, 16, 2048), (1, 1023, 0, 2049, 15), (5000,)):
    for packed, dtype in ((False, torch.float32), (True, torch.float16)):
        n = sum(lengths)
        a, b = tensors(n, 5, 1.0), tensors(n, 5, 1.0)
        for t in (a, b):
            t[1] = t[1].to(dtype)
            if packed:
                t[2], t[3] = SIGNED_169.encode(t[2]), UNSIGNED_0610.encode(t[3])
        copies = [torch.zeros(n, dtype=dtype) for _ in "ab"]
        fused(*a, HYPER, copies[0])
        pieces = [piece.clone() for piece in b[1].split(lengths)]  # each has memory of its own
        fused_pieces(b[0], pieces, b[2], b[3], HYPER, copies[1])
        same = [torch.equal(x, y) for x, y in zip((a[0], a[2], a[3], copies[0]), (b[0], b[2], b[3], copies[1]))]
        assert all(same), (lengths, packed, same)
        table = adamw_kernel._table(b[0], pieces)
        assert table is adamw_kernel._table(b[0], pieces) and table is not adamw_kernel._table(b[0], [piece.clone() for piece in pieces])
        assert table.aligned == (lengths != (1, 1023, 0, 2049, 15)) and len(table.owners) == sum(-(-length // 1024) for length in lengths)
codes = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
from train.optimizer import adamw_kernel as k
import triton, triton.language as tl
@triton.jit
def again(a, b, m: tl.constexpr, signed: tl.constexpr, largest: tl.constexpr, smallest: tl.constexpr):
    at = tl.arange(0, 65536)
    tl.store(b + at, k._encode(k._decode(tl.load(a + at), m, signed), m, signed, largest, smallest))
for fmt in (SIGNED_169, UNSIGNED_0610):
    out = torch.zeros_like(codes)
    again[(1,)](codes, out, fmt.significand, fmt.signed, fmt.largest, fmt.smallest)
    assert torch.equal(out, codes), fmt.name
@triton.jit
def rounded(a, b, m: tl.constexpr, signed: tl.constexpr, largest: tl.constexpr, smallest: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(b + at, k._encode(tl.load(a + at), m, signed, largest, smallest))
for fmt in (SIGNED_169, UNSIGNED_0610):
    values = edges(fmt)
    out = torch.zeros(values.numel(), dtype=torch.int16)
    rounded[(values.numel() // 1024,)](values, out, fmt.significand, fmt.signed, fmt.largest, fmt.smallest)
    assert torch.equal(out, fmt.encode(values)), (fmt.name, values[out != fmt.encode(values)][:4].tolist())
print("same")
"""


def test_the_fused_kernel_computes_the_same_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    root = str(ROOT)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root}
    script = tmp_path / "interpreted.py"  # triton reads a kernel's source from its file
    script.write_text(_INTERPRETED)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=root)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_the_benchmark_measures_both_kinds_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.bench import optimizer
    from train.machine.rates import Figure, Options

    monkeypatch.setattr(optimizer, "_COUNT", {"cpu": 1 << 12})
    monkeypatch.setattr(optimizer, "copy_rate", lambda _: Figure(1.0, 1.0, 1.0, "GB/s", 1))
    result = optimizer.run(Options(device="cpu", seconds=0.02, runs=2))
    kinds = {"update, fp32 moments", "update, 16-bit moments", "update, 16-bit moments and weights"}
    kinds.add("update, 16-bit moments and weights, 1,000 gradients")
    assert set(result.measured) == kinds and min(figure.value for figure in result.measured.values()) > 0


def test_apex_where_it_is_asked_for_and_absent_is_a_configuration_error() -> None:
    groups: list[Any] = [{"params": [torch.nn.Parameter(torch.ones(2))]}]
    if apex_parts.report() != {"apex FusedAdam": "available", "apex FusedLayerNorm": "available"}:
        with pytest.raises(
            ConfigError, match=r"dalle_fit.optimizer = 'apex': it cannot be .*; build NVIDIA's apex .* set dalle_fit.optimizer = 'paper'"
        ):
            apex_parts.adam(groups, betas=(0.9, 0.96), eps=1e-8, key="dalle_fit.optimizer")
        with pytest.raises(ConfigError, match=r"dalle.norm = 'apex': it cannot be .* set dalle.norm = 'torch'"):
            apex_parts.layer_norm("dalle.norm")


class FusedAdam(torch.optim.AdamW):
    """Stands in for apex's: the count lives in the group."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, adam_w_mode: bool = True) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=0.0)

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = torch.tensor(float(group["step"]))
        super().step()


def test_apexs_adam_follows_the_engines_counts_factors_and_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    apex = types.ModuleType("apex")
    optimizers: Any = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert apex_parts.report()["apex FusedAdam"] == "available"
    ours, theirs, idle = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(3))
    paper = PaperAdamW([{"params": [ours]}], betas=(0.9, 0.96))
    fused = apex_parts.adam([{"params": [theirs]}, {"params": [idle], "skip": True}], betas=(0.9, 0.96), eps=1e-8, key="k")
    for count in range(1, 5):
        for adam in (paper, fused):
            adam.count = count
            for group in adam.param_groups:
                group |= {"lr": 1e-2, "weight_decay": 0.1, "factor": 0.5}
        ours.grad, theirs.grad, idle.grad = (torch.arange(4.0) * count for _ in range(3))
        paper.step()
        fused.step()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert torch.equal(idle, torch.arange(4.0))
