"""The relaxation in blocks: equal to the plain formulas in values and derivatives, with noise of its own for each picture, in little memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.relaxation import GumbelNoise, Relaxed, argmax_codes, hard_codes, relaxed_codes

C, N, D = 6, 11, 5


def gumbel(batch: int, positions: int, vocab: int, first: int = 0) -> Tensor:
    """All noise of a batch [B * positions, vocab], at once."""
    (noise,) = GumbelNoise(range(first, first + batch)).blocks(positions, vocab, [(0, batch * positions)])
    return noise


def plain(inputs: list[Tensor], tau: float) -> Relaxed:
    """The formulas as the paper has them, by convolutions and autograd."""
    h_BCYX, w, b, codebook, bias = inputs
    logits_BNYX = F.conv2d(h_BCYX.float(), w, b)
    batch, vocab, rows, columns = logits_BNYX.shape
    g_BNYX = gumbel(batch, rows * columns, vocab).view(batch, rows, columns, vocab).permute(0, 3, 1, 2)
    x_BDYX = F.conv2d(F.softmax((logits_BNYX + g_BNYX) / tau, dim=1), codebook, bias)
    q_BNYX = F.softmax(logits_BNYX, dim=1)
    kl_BYX = (q_BNYX * (q_BNYX.log() - math.log(1 / vocab))).sum(1)
    return Relaxed(x_BDYX, kl_BYX, logits_BNYX.argmax(1))


def tensors(batch: int, side: int, dtype: torch.dtype = torch.float32, vocab: int = N, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = [(batch, C, side, side), (vocab, C, 1, 1), (vocab,), (D, vocab, 1, 1), (D,)]
    made = [scale * torch.randn(shape, generator=generator) for shape in shapes]
    made[0] = made[0].to(dtype).contiguous(memory_format=torch.channels_last)
    return [tensor.requires_grad_() for tensor in made]


def values_and_derivatives(found: Relaxed, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    total = (found.x_BDYX * torch.randn(found.x_BDYX.shape, generator=generator)).sum()
    total = total + (found.kl_BYX * torch.randn(found.kl_BYX.shape, generator=generator)).sum()
    return [found.x_BDYX, found.kl_BYX, *torch.autograd.grad(total, inputs)]


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(1, 4), side=st.integers(1, 4), block=st.integers(1, 400), tau=st.sampled_from([1.0, 0.5, 1 / 16]))
def test_any_blocks_give_the_values_and_derivatives_of_the_plain_formulas(batch: int, side: int, block: int, tau: float) -> None:
    inputs = tensors(batch, side)
    h, w, b, codebook, bias = inputs
    ours = relaxed_codes(h, (w, b), (codebook, bias), GumbelNoise(range(batch)), tau, block)
    theirs = plain(inputs, tau)
    assert torch.equal(ours.codes_BYX, theirs.codes_BYX)
    for a, b in zip(values_and_derivatives(ours, inputs), values_and_derivatives(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_features_in_half_precision_get_gradients_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        inputs = tensors(2, 3, dtype)
        h, w, b, codebook, bias = inputs
        found = values_and_derivatives(relaxed_codes(h, (w, b), (codebook, bias), GumbelNoise(range(2)), 0.5, 40), inputs)
        assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32, dtype, *[torch.float32] * 4]
        for a, b in zip(found, values_and_derivatives(plain(inputs, 0.5), inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4 if a.dtype == torch.float32 else 0.02, atol=1e-4 if a.dtype == torch.float32 else 0.02)


def test_true_codes_are_the_argmax_and_their_kl_is_that_of_the_relaxation() -> None:
    inputs = tensors(3, 4)
    h, w, b, codebook, bias = inputs
    hard = hard_codes(h, (w, b), block=50)
    relaxed = relaxed_codes(h, (w, b), (codebook, bias), GumbelNoise(range(3)), 0.5)
    assert torch.equal(argmax_codes(h, (w, b), block=70), hard.codes_BYX)
    assert torch.equal(hard.codes_BYX, F.conv2d(h, w, b).argmax(1)) and torch.equal(relaxed.codes_BYX, hard.codes_BYX)
    torch.testing.assert_close(hard.kl_BYX, relaxed.kl_BYX)


def test_kl_is_zero_for_even_logits_and_ln_n_for_a_certain_code() -> None:
    h = torch.ones(1, 1, 1, 1)
    even, certain = torch.zeros(N, 1, 1, 1), torch.full((N, 1, 1, 1), -1e4)
    certain[3] = 0
    assert hard_codes(h, (even, torch.zeros(N))).kl_BYX.item() == pytest.approx(0, abs=1e-6)
    assert hard_codes(h, (certain, torch.zeros(N))).kl_BYX.item() == pytest.approx(math.log(N))


def test_relaxed_codes_are_distributions_that_harden_as_tau_falls() -> None:
    h, w, b, *_ = tensors(2, 3)
    identity = torch.eye(N).view(N, N, 1, 1)
    logits_RN = F.conv2d(h, w, b).permute(0, 2, 3, 1).reshape(-1, N)
    hard_RN = F.one_hot((logits_RN + gumbel(2, 9, N)).argmax(1), N).float()
    gaps = []
    for tau in (4.0, 1.0, 1 / 4, 1 / 16, 1e-3):
        soft_RN = relaxed_codes(h, (w, b), (identity, torch.zeros(N)), GumbelNoise(range(2)), tau).x_BDYX.permute(0, 2, 3, 1).reshape(-1, N)
        torch.testing.assert_close(soft_RN.sum(1), torch.ones(18))
        gaps.append((soft_RN - hard_RN).abs().sum(1).mean().item())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-2 < gaps[0]


def test_noise_has_the_distributions_mean_and_variance() -> None:
    g = gumbel(4, 1024, 64)
    assert g.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    assert torch.isfinite(g).all()


def test_noise_of_a_picture_depends_on_its_own_seed_alone_and_repeats_in_other_blocks() -> None:
    whole = gumbel(3, 10, N)
    assert torch.equal(whole[10:20], gumbel(1, 10, N, first=1)) and not torch.equal(whole[:10], whole[10:20])
    source = GumbelNoise(range(3))
    for spans in ([(0, 7), (7, 14), (14, 30)], [(i, i + 1) for i in range(30)]):
        assert torch.equal(torch.cat(list(source.blocks(10, N, spans))), whole)


def test_the_largest_of_noisy_logits_follows_the_softmax() -> None:
    logits_N = torch.tensor([0.0, 1.0, 2.0])
    shares_N = torch.bincount((logits_N + gumbel(1, 10_000, 3, first=3)).argmax(1)) / 10_000
    torch.testing.assert_close(shares_N, logits_N.softmax(0), atol=0.02, rtol=0)


def test_noise_without_a_seed_for_each_picture_is_refused() -> None:
    h, w, b, codebook, bias = tensors(2, 3)
    with pytest.raises(ValueError, match="1 seeds of noise for 2 pictures: give one for each picture"):
        relaxed_codes(h, (w, b), (codebook, bias), GumbelNoise([0]), 1.0)


def kept_bytes(build: object, inputs: list[Tensor]) -> int:
    """Bytes that autograd keeps between the passes, inputs aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        build()  # type: ignore[operator]
    return sum(found.values())


def test_a_vocabulary_of_thousands_is_not_kept_between_the_passes() -> None:
    inputs = tensors(2, 16, vocab=8192)
    h, w, b, codebook, bias = inputs
    one = 2 * 16 * 16 * 8192 * 4  # bytes of one tensor with a value for each code
    ours = kept_bytes(lambda: relaxed_codes(h, (w, b), (codebook, bias), GumbelNoise(range(2)), 0.5, 1 << 20), inputs)
    theirs = kept_bytes(lambda: plain(inputs, 0.5), inputs)
    assert ours == 0
    assert theirs >= 3 * one
