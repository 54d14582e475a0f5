"""Cross-entropy in chunks equals torch's, and holds the logits once at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from model import head
from model.head import Unembedding, chunk_rows, cross_entropy
from train.machine.live_bytes import LiveBytes


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 8), vocab=st.integers(1, 30), chunk=st.integers(1, 300), keeps=st.booleans())
def test_losses_and_gradients_equal_those_of_torch_whatever_the_chunk(rows: int, width: int, vocab: int, chunk: int, keeps: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": chunk})
        g = torch.Generator().manual_seed(rows * 1000 + vocab)
        x_ND, weight_VD = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g)
        targets_N, above_N = torch.randint(vocab, (rows,), generator=g), torch.randn(rows, generator=g)
        results = []
        for function in (
            lambda x, w: cross_entropy(x, w, targets_N, keeps_logits=keeps),
            lambda x, w: F.cross_entropy(x @ w.t(), targets_N, reduction="none"),
        ):
            x, w = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
            nll_N = function(x, w)
            (nll_N * above_N).sum().backward()
            results.append((nll_N.detach(), x.grad, w.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keeps", [True, False])
def test_the_z_loss_is_in_the_gradient_and_not_in_the_figure(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, against autograd; in inference it changes nothing, and a weight of 0 leaves every bit."""
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": 40})
    g = torch.Generator().manual_seed(0)
    x_ND, weight_VD, targets_N, above_N = torch.randn(9, 4, generator=g), torch.randn(11, 4, generator=g), torch.arange(9), torch.rand(9, generator=g)

    def by_autograd(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x @ w.t(), targets_N, reduction="none") + 0.3 * (x @ w.t()).logsumexp(1).square()

    def gradients(function: Any) -> list[torch.Tensor]:
        x, w = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        (function(x, w) * above_N).sum().backward()
        assert x.grad is not None and w.grad is not None
        return [x.grad, w.grad]

    ours = gradients(lambda x, w: cross_entropy(x, w, targets_N, keeps_logits=keeps, z_loss=0.3))
    torch.testing.assert_close(ours, gradients(by_autograd), rtol=1e-4, atol=1e-5)
    plain, zero = (gradients(lambda x, w, z=z: cross_entropy(x, w, targets_N, keeps_logits=keeps, **z)) for z in ({}, {"z_loss": 0.0}))
    assert all(map(torch.equal, plain, zero)) and not torch.allclose(ours[0], plain[0])
    shown = (cross_entropy(x_ND, weight_VD, targets_N, keeps_logits=keeps, z_loss=z) for z in (0.0, 0.3))
    assert torch.equal(*shown)


@pytest.mark.parametrize("keeps", [True, False])
def test_bf16_products_read_rounded_operands_and_everything_else_is_fp32(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, against the same formula in float64 on rounded operands: what is left is the rounding of each product on a CPU."""
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", {"cpu": 200})
    g = torch.Generator().manual_seed(0)
    x_ND, weight_VD, targets_N = torch.randn(40, 16, generator=g), torch.randn(30, 16, generator=g), torch.arange(40) % 30
    x, w = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    nll_N = cross_entropy(x, w, targets_N, keeps_logits=keeps, products=torch.bfloat16)
    nll_N.sum().backward()
    assert x.grad is not None and w.grad is not None and nll_N.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    read_ND, read_VD = (t.bfloat16().double() for t in (x_ND, weight_VD))
    logits_NV = (read_ND @ read_VD.t()).bfloat16().double()
    torch.testing.assert_close(nll_N.double(), F.cross_entropy(logits_NV, targets_N, reduction="none"), rtol=1e-3, atol=1e-3)
    grad_NV = (logits_NV.softmax(1) - F.one_hot(targets_N, 30)).float().bfloat16().double()
    torch.testing.assert_close(x.grad.double(), (grad_NV @ read_VD).bfloat16().double(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(w.grad.double(), grad_NV.t() @ read_ND, rtol=1e-2, atol=2e-2)
    exact_N = cross_entropy(x_ND, weight_VD, targets_N, keeps_logits=keeps)
    assert 1e-4 < (nll_N - exact_N).abs().max() < 0.1, "it is another arithmetic, and close"


def test_products_are_fp32_in_evaluation() -> None:
    torch.manual_seed(0)
    plain, rounded = Unembedding(16, 30, 0.125), Unembedding(16, 30, 0.125, products=torch.bfloat16)
    rounded.load_state_dict(plain.state_dict())
    x_BPD, targets_BP = torch.randn(2, 5, 16), torch.randint(30, (2, 5))
    assert not torch.equal(plain(x_BPD, targets_BP), rounded(x_BPD, targets_BP)) and torch.equal(plain(x_BPD), rounded(x_BPD))
    assert torch.equal(plain(x_BPD, targets_BP), rounded.eval()(x_BPD, targets_BP))


def test_huge_logits_stay_finite() -> None:
    x_ND, weight_VD = torch.full((2, 1), 100.0, requires_grad=True), torch.tensor([[100.0], [-100.0]], requires_grad=True)
    nll_N = cross_entropy(x_ND, weight_VD, torch.tensor([0, 1]), keeps_logits=True)
    nll_N.sum().backward()
    assert nll_N.tolist() == [0.0, 20000.0]
    assert x_ND.grad is not None and x_ND.grad.isfinite().all()


@pytest.mark.parametrize(("keeps", "most"), [(True, 1.3), (False, 0.3)])
def test_the_logits_are_in_memory_once_and_without_keeping_only_a_chunk_of_them(keeps: bool, most: float) -> None:
    """Counted bytes of forward and backward, next to one copy of the logits; torch's own cross-entropy holds three."""
    rows, width, vocab = 4096, 8, 2048
    logits_bytes = 4 * rows * vocab
    unembedding = Unembedding(width, vocab, 0.125)
    x_BPD, targets_BP = torch.randn(2, rows // 2, width, requires_grad=True), torch.randint(vocab, (2, rows // 2))

    def peak(forward: object) -> float:
        live = LiveBytes()
        for tensor in (x_BPD, targets_BP, unembedding.weight):
            live.follow(tensor)
        before = live.now
        with live:
            live.restart()
            forward().sum().backward()  # type: ignore[operator]
        return (live.peak - before) / logits_bytes

    assert chunk_rows(vocab, "cpu") < rows / 3
    assert peak(lambda: unembedding(x_BPD, targets_BP, keeps)) < most
    assert peak(lambda: F.cross_entropy(unembedding(x_BPD).flatten(0, 1), targets_BP.flatten(), reduction="none")) > 2


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    unembedding = Unembedding(4, 50, 0.125)
    with torch.no_grad():
        nll_BP = unembedding(torch.randn(2, 3, 4), torch.randint(50, (2, 3)))
    assert nll_BP.shape == (2, 3) and nll_BP.grad_fn is None


def test_without_targets_the_head_gives_logits() -> None:
    unembedding, x_BPD = Unembedding(4, 50, 0.125), torch.randn(2, 3, 4)
    torch.testing.assert_close(unembedding(x_BPD), x_BPD @ unembedding.weight.t())


def test_a_chunk_has_at_least_one_row_and_is_larger_on_a_gpu() -> None:
    assert chunk_rows(1 << 30, "cpu") == 1
    assert chunk_rows(8192, "cuda") == 8192 and chunk_rows(8192, "cpu") == 256
