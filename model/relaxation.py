"""From encoder features to code vectors: logits, Gumbel-softmax, KL and the product with the codebook, as one autograd function (paper 2.1, A.3).

Shapes: R rows (code positions of all pictures, one after the other), C encoder channels, N code vocabulary, D width of a code vector,
B batch, Y X rows and columns of the code grid.

A tensor with N values for each position is far larger than anything else here: 32 MiB in fp32 for one picture of the released size. Autograd would keep four of
them (logits, noise, relaxed codes, derivative of the KL). These functions process the rows in blocks and keep none: the backward pass draws the same noise again
and recomputes each block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK_ELEMENTS = 1 << 23
"""Number of values in a block (32 MiB in fp32, one picture of the released size): enough for a GPU's matrix units, and little beside a large model's activations."""
KEPT_ELEMENTS = 1 << 21
"""If there are no more values than this in all, two tensors are kept instead (16 MiB): in a small model, recomputing would cost more than it saves."""

Span = tuple[int, int]


class GumbelNoise:
    """Standard Gumbel noise of a batch, drawn when it is needed; drawing it again gives the same numbers.

    Args:
        seeds: one for each picture, on which alone its noise depends.
        device: where the noise is drawn. The same seed gives other numbers on a GPU than on a CPU.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seeds, self.device = list(seeds), torch.device(device)

    def blocks(self, positions: int, vocab: int, spans: Sequence[Span]) -> Iterator[Tensor]:
        """Noise [stop - start, vocab] in fp32 for each span of rows. The spans must be consecutive from row 0 on; each picture has ``positions`` rows."""
        generator = torch.Generator(device=self.device)
        picture = -1
        for start, stop in spans:
            noise_rN = torch.empty(stop - start, vocab, device=self.device)
            row = start
            while row < stop:
                if row // positions != picture:
                    picture = row // positions
                    generator.manual_seed(self.seeds[picture])
                end = min(stop, (picture + 1) * positions)
                # exponential_ would save a logarithm, but it is ten times as slow on a CPU.
                noise_rN[row - start : end - start].uniform_(generator=generator)
                row = end
            # Uniform numbers are multiples of 2^-24; an exact zero would give infinite noise.
            yield noise_rN.clamp_(min=2.0**-25).log_().neg_().log_().neg_()


class Relaxed(NamedTuple):
    """The results of ``relaxed_codes``."""

    x_BDYX: Tensor
    """Code vectors, mixed with the relaxed codes as weights, fp32."""
    kl_BYX: Tensor
    """KL divergence in nats of the softmax of the logits, without noise and temperature, from the uniform prior (paper 2.1)."""
    codes_BYX: Tensor
    """The true codes: argmax of the logits, int64."""


class Hard(NamedTuple):
    """The results of ``hard_codes``."""

    kl_BYX: Tensor
    codes_BYX: Tensor


def relaxed_codes(
    h_BCYX: Tensor, to_logits: tuple[Tensor, Tensor], codebook: tuple[Tensor, Tensor], noise: GumbelNoise, tau: float, block: int = BLOCK_ELEMENTS
) -> Relaxed:
    """Gumbel-softmax over the logits of ``h`` at temperature tau, times the codebook. It is relaxed in both forward and backward pass (no straight-through).

    Args:
        h_BCYX: encoder features before the last convolution, any float dtype; products are computed in fp32 (paper A.3 and release).
        to_logits: weight [N, C, 1, 1] and bias [N] of the encoder's last convolution.
        codebook: weight [D, N, 1, 1] and bias [D] of the decoder's first convolution.
        noise: noise of this batch.
        tau: temperature.
        block: most logits that are held at once.

    Raises:
        ValueError: the noise does not have one seed for each picture.
    """
    batch, _, rows, columns = h_BCYX.shape
    if len(noise.seeds) != batch:
        raise ValueError(f"{len(noise.seeds)} seeds of noise for {batch} pictures: give one for each picture")
    (w, b_N), (codebook_w, b_D) = to_logits, codebook
    flat = (_rows(h_BCYX), w.flatten(1), b_N, codebook_w.flatten(1), b_D)
    x_RD, kl_R, codes_R = _Relaxed.apply(*flat, noise, rows * columns, tau, block)
    shape = (batch, rows, columns)
    return Relaxed(x_RD.view(*shape, -1).permute(0, 3, 1, 2), kl_R.view(shape), codes_R.view(shape))


@torch.no_grad()
def hard_codes(h_BCYX: Tensor, to_logits: tuple[Tensor, Tensor], block: int = BLOCK_ELEMENTS) -> Hard:
    """True codes and KL of the logits of ``h``; arguments as in ``relaxed_codes``."""
    parts = [(_negative_entropy(logits_rN)[0], logits_rN.argmax(-1)) for logits_rN in _logits(h_BCYX, to_logits, block)]
    shape = (len(h_BCYX), *h_BCYX.shape[2:])
    entropy_R, codes_R = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Hard((entropy_R + math.log(len(to_logits[1]))).view(shape), codes_R.view(shape))


@torch.no_grad()
def argmax_codes(h_BCYX: Tensor, to_logits: tuple[Tensor, Tensor], block: int = BLOCK_ELEMENTS) -> Tensor:
    """Only the codes of ``hard_codes``, [B, Y, X], int64."""
    codes_R = torch.cat([logits_rN.argmax(-1) for logits_rN in _logits(h_BCYX, to_logits, block)])
    return codes_R.view(len(h_BCYX), *h_BCYX.shape[2:])


def _logits(h_BCYX: Tensor, to_logits: tuple[Tensor, Tensor], block: int) -> Iterator[Tensor]:
    """Logits [r, N], block by block."""
    h_RC, (w, b_N) = _rows(h_BCYX), to_logits
    for start, stop in _spans(len(h_RC), len(b_N), block):
        yield torch.addmm(b_N, h_RC[start:stop].float(), w.flatten(1).T)


class _Relaxed(torch.autograd.Function):
    """(h [R, C], W [N, C], b [N], codebook [D, N], b [D]) -> (x [R, D], KL [R], codes [R]), with derivatives written by hand, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        h_RC: Tensor,
        w_NC: Tensor,
        b_N: Tensor,
        codebook_DN: Tensor,
        b_D: Tensor,
        noise: GumbelNoise,
        positions: int,
        tau: float,
        block: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spans = _spans(len(h_RC), len(b_N), block)
        keep = len(spans) == 1 and h_RC.shape[0] * len(b_N) <= KEPT_ELEMENTS
        found = [
            _forward_block(h_RC[start:stop].float(), w_NC, b_N, codebook_DN, b_D, noise_rN, tau, keep)
            for (start, stop), noise_rN in zip(spans, noise.blocks(positions, len(b_N), spans), strict=True)
        ]
        ctx.save_for_backward(h_RC, w_NC, b_N, codebook_DN, *found[0][3:])
        ctx.rest = (noise, positions, tau, spans)
        x_RD, total_R, codes_R = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in list(zip(*found, strict=True))[:3])
        ctx.mark_non_differentiable(codes_R)
        return x_RD, total_R + math.log(len(b_N)), codes_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h_RC, w_NC, b_N, codebook_DN, *kept = ctx.saved_tensors
        noise, positions, tau, spans = ctx.rest
        grad_x_RD, grad_kl_R = grads[0], grads[1]
        sums = tuple(torch.zeros_like(tensor) for tensor in (w_NC, b_N, codebook_DN))
        grad_h_RC = torch.empty_like(h_RC)
        noises = iter([None]) if kept else noise.blocks(positions, len(b_N), spans)
        for (start, stop), noise_rN in zip(spans, noises, strict=True):
            h_rC = h_RC[start:stop].float()
            soft_rN, derivative_rN = kept if noise_rN is None else _again(h_rC, w_NC, b_N, noise_rN, tau)
            grads_r = (grad_x_RD[start:stop], grad_kl_R[start:stop])
            grad_h_RC[start:stop] = _backward_block(h_rC, w_NC, codebook_DN, soft_rN, derivative_rN, *grads_r, tau, sums)
            del soft_rN, derivative_rN, noise_rN  # free this block before the next one is computed
        return grad_h_RC, *sums, grad_x_RD.sum(0), None, None, None, None


def _forward_block(
    h_rC: Tensor, w_NC: Tensor, b_N: Tensor, codebook_DN: Tensor, b_D: Tensor, noise_rN: Tensor, tau: float, keep: bool
) -> tuple[Tensor, ...]:
    """x [r, D], negative entropy [r], codes [r]; and, if ``keep``, relaxed codes and the entropy's derivative [r, N]."""
    logits_rN = torch.addmm(b_N, h_rC, w_NC.T)
    total_r, derivative_rN = _negative_entropy(logits_rN)
    soft_rN = _soften(logits_rN, noise_rN, tau)
    found = (torch.addmm(b_D, soft_rN, codebook_DN.T), total_r, logits_rN.argmax(-1))
    return (*found, soft_rN, derivative_rN) if keep else found


def _again(h_rC: Tensor, w_NC: Tensor, b_N: Tensor, noise_rN: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Relaxed codes and the entropy's derivative of a block, from its features and noise."""
    logits_rN = torch.addmm(b_N, h_rC, w_NC.T)
    return _soften(logits_rN, noise_rN, tau), _negative_entropy(logits_rN)[1]


def _backward_block(
    h_rC: Tensor,
    w_NC: Tensor,
    codebook_DN: Tensor,
    soft_rN: Tensor,
    derivative_rN: Tensor,
    grad_x_rD: Tensor,
    grad_kl_r: Tensor,
    tau: float,
    sums: tuple[Tensor, ...],
) -> Tensor:
    """The gradient of a block's features. The gradients of W, b and the codebook are added to ``sums``."""
    grad_w_NC, grad_b_N, grad_codebook_DN = sums
    grad_codebook_DN.addmm_(grad_x_rD.T, soft_rN)
    # The gradient of a softmax is soft * (grad - <grad, soft>); the chain rule to the logits divides by tau.
    grad_logits_rN = torch._softmax_backward_data(grad_x_rD @ codebook_DN, soft_rN, -1, soft_rN.dtype).mul_(1 / tau)
    grad_logits_rN.addcmul_(derivative_rN, grad_kl_r.unsqueeze(-1))
    grad_w_NC.addmm_(grad_logits_rN.T, h_rC)
    grad_b_N += grad_logits_rN.sum(0)
    return grad_logits_rN @ w_NC


def _rows(h_BCYX: Tensor) -> Tensor:
    return h_BCYX.permute(0, 2, 3, 1).flatten(0, 2)  # a view, if the features are in channels-last order


def _spans(rows: int, vocab: int, block: int) -> list[Span]:
    each = max(1, block // vocab)
    return [(start, min(rows, start + each)) for start in range(0, rows, each)]


def _soften(logits_rN: Tensor, noise_rN: Tensor, tau: float) -> Tensor:
    """softmax((logits + noise) / tau). Overwrites the noise."""
    return F.softmax(noise_rN.add_(logits_rN).mul_(1 / tau), dim=-1)


def _negative_entropy(logits_rN: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of q ln q for q = softmax(logits), [r], and its derivative with respect to the logits, [r, N]."""
    log_q_rN = F.log_softmax(logits_rN, dim=-1)
    q_rN = log_q_rN.exp()
    total_r = torch.linalg.vecdot(q_rN, log_q_rN)
    # q * (ln q - total); the logarithm is not needed again, so its memory becomes the derivative.
    return total_r, log_q_rN.sub_(total_r.unsqueeze(-1)).mul_(q_rN)
