"""The discrete VAE (paper 2.1 and A.1-A.3; sizes and names of the release): pictures to a grid of codes and back.

Shapes: B batch, N code vocabulary, C channels, Y X rows and columns (of pixels or of the code grid), D width of a code vector.
Parameters carry the release's names (``encoder.blocks.group_1.block_1.res_path.conv_1.w``), so that its weights convert by name.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import DVAEConfig

EPSILON = 0.1
"""Margin of the pixel mapping: pixels in [0, 1] land in [EPSILON, 1 - EPSILON], where the likelihood is finite (paper Eq. 3)."""


def map_pixels(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> [0.1, 0.9], the domain of the networks and the likelihood (paper Eq. 3). Any shape."""
    return (1 - 2 * EPSILON) * pixels + EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """Inverse of `map_pixels`, clamped to [0, 1]. Any shape."""
    return ((mapped - EPSILON) / (1 - 2 * EPSILON)).clamp(0, 1)


def logit_laplace_nll(mapped: Tensor, mu: Tensor, ln_b: Tensor) -> Tensor:
    """Negative log density in nats of the logit-Laplace distribution (paper Eq. 2), element by element.

    Args:
        mapped: values in (0, 1), mapped pixels; mu, ln_b: location and log scale on the logit axis. All of one shape, fp32.
    """
    log_x, log_1mx = torch.log(mapped), torch.log1p(-mapped)
    return math.log(2) + ln_b + log_x + log_1mx + (log_x - log_1mx - mu).abs() * torch.exp(-ln_b)


class _NegativeEntropy(torch.autograd.Function):
    """Sum of q ln q over the last axis for q = softmax(logits). Fused by hand: autograd would make three more passes over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        log_q = F.log_softmax(logits, dim=-1)
        q = log_q.exp()
        total = torch.linalg.vecdot(q, log_q)
        # d total / d logits = q * (ln q - total); the log is not needed again, so its memory becomes the derivative.
        ctx.save_for_backward(log_q.sub_(total.unsqueeze(-1)).mul_(q))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return torch.mul(derivative, grads[0].unsqueeze(-1))


def kl_to_uniform(logits_BNYX: Tensor) -> Tensor:
    """KL divergence in nats of softmax(logits) over N from the uniform prior, [B, Y, X]: ln N minus the entropy (paper 2.1).

    The plain softmax, without noise or temperature, even while the relaxation is on.
    """
    negative_entropy_BYX: Tensor = _NegativeEntropy.apply(logits_BNYX.permute(0, 2, 3, 1))
    return negative_entropy_BYX + math.log(logits_BNYX.shape[1])


def gumbel_like(shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise [B, N, Y, X] in fp32, sample i from ``generators[i]`` alone, so that it depends on nothing else in the batch.

    Stored with N innermost, as the logits of channels-last pictures are.

    Raises:
        ValueError: not one generator for each sample.
    """
    batch, vocab, rows, columns = shape
    if len(generators) != batch:
        raise ValueError(f"{len(generators)} generators for {batch} samples: give one for each sample")
    noise_BYXN = torch.empty(batch, rows, columns, vocab, device=device)
    for sample_YXN, generator in zip(noise_BYXN, generators, strict=True):
        sample_YXN.uniform_(generator=generator)  # exponential_ would save a logarithm, but is ten times as slow on a CPU
    # Uniform numbers are multiples of 2^-24; an exact zero would become an infinity.
    noise_BYXN.clamp_(min=2.0**-25)
    return noise_BYXN.log_().neg_().log_().neg_().permute(0, 3, 1, 2)


def relax(logits_BNYX: Tensor, gumbel_BNYX: Tensor, tau: float) -> Tensor:
    """Gumbel-softmax over N at temperature tau, [B, N, Y, X]: relaxed in forward and backward, no straight-through (paper 2.1)."""
    # The sum is ours alone: scaling it in place spares a pass over the largest tensor of a small model.
    soft_BYXN = F.softmax((logits_BNYX + gumbel_BNYX).mul_(1 / tau).permute(0, 2, 3, 1), dim=-1)
    return soft_BYXN.permute(0, 3, 1, 2)


def loss(nll_B: Tensor, kl_B: Tensor, beta: float, downsample: int) -> Tensor:
    """The objective per pixel value (paper A.2): NLL per value plus beta / (3 f^2) times KL per position, averaged over the batch.

    Each code position answers for 3 f^2 pixel values, hence the divisor; 192 at the paper's f = 8. It is not to be divided again.
    """
    return nll_B.mean() + beta / (3 * downsample**2) * kl_B.mean()


class DVAETerms(NamedTuple):
    """What one forward pass yields."""

    nll_B: Tensor
    """Negative log likelihood of each picture in nats per pixel value."""
    kl_B: Tensor
    """KL divergence of each picture in nats per code position."""
    stats_B6YX: Tensor
    """Decoder output: mu (3 channels) and ln b (3 channels) on the logit axis, fp32."""
    logits_BNYX: Tensor
    """Encoder output: code logits, fp32."""


class Conv2d(nn.Module):
    """A convolution of stride 1 that keeps the picture's size. Parameters are fp32, products are done in ``compute_dtype``."""

    def __init__(self, n_in: int, n_out: int, kernel: int, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.padding = (kernel - 1) // 2
        # A gain of 1, not He's: the ReLUs sit inside branches whose share of the output is small.
        self.w = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel) / math.sqrt(n_in * kernel**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        dtype = self.compute_dtype
        return F.conv2d(x_BCYX.to(dtype), self.w.to(dtype), self.b.to(dtype), padding=self.padding)


class ResidualBlock(nn.Module):
    """``id_path(x) + gain * res_path(x)``, a bottleneck of a quarter of the width; no normalisation (paper A.1 and release)."""

    def __init__(self, n_in: int, n_out: int, kernels: Sequence[int], gain: float, compute_dtype: torch.dtype) -> None:
        super().__init__()
        hidden = n_out // 4
        widths = [n_in, hidden, hidden, hidden, n_out]
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel, compute_dtype)
        self.id_path = Conv2d(n_in, n_out, 1, compute_dtype) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential(path)
        # Small residual branches: at initialisation the network is close to its identity paths, whatever its depth (paper 2.1).
        self.gain = gain

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return torch.add(self.id_path(x_BCYX), self.res_path(x_BCYX), alpha=self.gain)


def _group(cfg: DVAEConfig, n_in: int, n_out: int, kernels: Sequence[int], compute_dtype: torch.dtype) -> OrderedDict[str, nn.Module]:
    gain = 1 / (cfg.groups * cfg.blocks_per_group) ** 2
    widths = [n_in, *[n_out] * cfg.blocks_per_group]
    return OrderedDict((f"block_{i + 1}", ResidualBlock(widths[i], n_out, kernels, gain, compute_dtype)) for i in range(cfg.blocks_per_group))


def _output(n_in: int, n_out: int) -> nn.Sequential:
    # Always fp32: a bf16 mu is off by up to 1/128, which a sharp likelihood (flat background) would punish.
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1)))


class Encoder(nn.Module):
    """Mapped pixels [B, 3, S, S] -> code logits [B, N, S/f, S/f], fp32. The first log2(f) groups end in a max-pool."""

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        pools = cfg.downsample.bit_length() - 1
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, cfg.width, 7, compute_dtype))
        n_in = cfg.width
        for i in range(cfg.groups):
            group = _group(cfg, n_in, cfg.width * 2**i, (3, 3, 3, 1), compute_dtype)
            if i < pools:
                group["pool"] = nn.MaxPool2d(2)
            blocks[f"group_{i + 1}"] = nn.Sequential(group)
            n_in = cfg.width * 2**i
        blocks["output"] = _output(n_in, cfg.vocab)
        self.blocks = nn.Sequential(blocks)
        self.image_size = cfg.image_size

    def forward(self, mapped_B3YX: Tensor) -> Tensor:
        """Raises ValueError for pictures of another size than dvae.image_size or of other than 3 channels."""
        expected = (3, self.image_size, self.image_size)
        if mapped_B3YX.ndim != 4 or mapped_B3YX.shape[1:] != expected:
            raise ValueError(
                f"pictures of shape {list(mapped_B3YX.shape)}: expected [batch, {', '.join(map(str, expected))}]; crop them or change dvae.image_size"
            )
        logits_BNYX: Tensor = self.blocks(mapped_B3YX)
        return logits_BNYX


class Decoder(nn.Module):
    """Codes as (relaxed) one-hot vectors [B, N, S/f, S/f] -> mu and ln b [B, 6, S, S], fp32. Mirrors the encoder's groups.

    The first 1x1 convolution is the codebook: column k of its weight is code vector k.
    """

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        ups = cfg.downsample.bit_length() - 1
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(cfg.vocab, cfg.init_width, 1))
        if ups == cfg.groups:
            # The encoder's last group works at twice the grid, so its mirror, the decoder's first, does too.
            blocks["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
        n_in = cfg.init_width
        for i in range(1, cfg.groups + 1):
            n_out = cfg.width * 2 ** (cfg.groups - i)
            group = _group(cfg, n_in, n_out, (1, 3, 3, 3), compute_dtype)
            if cfg.groups - ups <= i < cfg.groups:
                group["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            blocks[f"group_{i}"] = nn.Sequential(group)
            n_in = n_out
        blocks["output"] = _output(n_in, 6)
        self.blocks = nn.Sequential(blocks)
        self.grid = cfg.grid

    def forward(self, z_BNYX: Tensor) -> Tensor:
        stats_B6YX: Tensor = self.blocks(z_BNYX)
        return stats_B6YX

    def from_codes(self, codes_BYX: Tensor) -> Tensor:
        """As ``forward`` of the one-hot vectors of the codes, bit for bit, by looking code vectors up instead of multiplying.

        Raises:
            ValueError: the codes are not integers [B, grid, grid].
        """
        if codes_BYX.ndim != 3 or codes_BYX.shape[1:] != (self.grid, self.grid) or codes_BYX.is_floating_point():
            raise ValueError(
                f"codes of shape {list(codes_BYX.shape)} and {codes_BYX.dtype}: expected integers [batch, {self.grid}, {self.grid}], "
                f"the grid of dvae.image_size / dvae.downsample"
            )
        codebook = self.blocks.get_submodule("input")
        assert isinstance(codebook, Conv2d)
        x_BYXD = F.embedding(codes_BYX.long(), codebook.w[:, :, 0, 0].T) + codebook.b
        x: Tensor = x_BYXD.permute(0, 3, 1, 2)
        for module in list(self.blocks)[1:]:
            x = module(x)
        return x


class DVAE(nn.Module):
    """Encoder and decoder with the training objective.

    Args:
        cfg: the sizes.
        compute_dtype: dtype of the convolutions' products; the 1x1 convolutions around the relaxation, the decoder's last one, the
            relaxation and the likelihood stay fp32 (paper A.3 and release).
        min_ln_b: floor of ln b in the likelihood; the paper has none (-inf). The density of exactly flat areas (drawings on white) is
            unbounded, so that without a floor they drown everything else in the objective, and codes fall out of use.
    """

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32, min_ln_b: float = -math.inf) -> None:
        super().__init__()
        self.cfg, self.min_ln_b = cfg, min_ln_b
        self.encoder = Encoder(cfg, compute_dtype)
        self.decoder = Decoder(cfg, compute_dtype)

    def forward(self, pixels_B3YX: Tensor, gumbel_BNYX: Tensor | None, tau: float = 1.0) -> DVAETerms:
        """Both terms of the objective for pictures in [0, 1].

        Args:
            pixels_B3YX: fp32 pictures [B, 3, S, S] in [0, 1]; fastest in channels-last order.
            gumbel_BNYX: noise of the relaxation (`gumbel_like`); None decodes the true codes (argmax), through which no gradient flows.
            tau: temperature of the relaxation; unused without noise.

        Raises:
            ValueError: pictures of another size than dvae.image_size.
        """
        mapped_B3YX = map_pixels(pixels_B3YX)
        logits_BNYX = self.encoder(mapped_B3YX)
        stats_B6YX = self.decoder.from_codes(logits_BNYX.argmax(1)) if gumbel_BNYX is None else self.decoder(relax(logits_BNYX, gumbel_BNYX, tau))
        mu_B3YX, ln_b_B3YX = stats_B6YX.chunk(2, dim=1)
        nll_B = logit_laplace_nll(mapped_B3YX, mu_B3YX, ln_b_B3YX.clamp_min(self.min_ln_b)).mean((1, 2, 3))
        return DVAETerms(nll_B, kl_to_uniform(logits_BNYX).mean((1, 2)), stats_B6YX, logits_BNYX)

    @torch.no_grad()
    def encode(self, pixels_B3YX: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [0, 1] -> codes [B, grid, grid], int64: argmax of the logits, no noise (paper 2.2).

        Raises:
            ValueError: pictures of another size than dvae.image_size.
        """
        codes_BYX: Tensor = self.encoder(map_pixels(pixels_B3YX)).argmax(1)
        return codes_BYX

    @torch.no_grad()
    def decode(self, codes_BYX: Tensor) -> Tensor:
        """Codes [B, grid, grid] -> pictures [B, 3, S, S] in [0, 1]: the mode's location, ln b is ignored (paper A.3).

        Raises:
            ValueError: codes of another grid.
        """
        return pictures(self.decoder.from_codes(codes_BYX))


def pictures(stats_B6YX: Tensor) -> Tensor:
    """Decoder output -> pictures [B, 3, Y, X] in [0, 1]."""
    return unmap_pixels(torch.sigmoid(stats_B6YX[:, :3]))
