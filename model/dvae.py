"""The discrete VAE (paper 2.1 and A.1-A.3; sizes and names of the release): pictures to a grid of codes and back.

Shapes: B batch, N code vocabulary, C channels, Y X rows and columns (of pixels or of the code grid), D width of a code vector.
Parameters carry the release's names (``encoder.blocks.group_1.block_1.res_path.conv_1.w``), so that its weights convert by name.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model.config import DVAEConfig
from model.image_tokenizer import ImageTokenizer, check_codes, check_pixels
from model.relaxation import GumbelNoise, argmax_codes, hard_codes, relaxed_codes
from model.starts import normal

EPSILON = 0.1
"""Margin of the pixel mapping: pixels in [0, 1] are mapped to [EPSILON, 1 - EPSILON], where the likelihood is finite (paper Eq. 3)."""


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


def loss(nll_B: Tensor, kl_B: Tensor, beta: float, downsample: int) -> Tensor:
    """The objective per pixel value (paper A.2): NLL per value plus beta / (3 f^2) times KL per position, averaged over the batch.

    The divisor is there because each code position stands for 3 f^2 pixel values (192 at the paper's f = 8). It must not be applied a second time.
    """
    return nll_B.mean() + beta / (3 * downsample**2) * kl_B.mean()


class DVAETerms(NamedTuple):
    """The results of a forward pass."""

    nll_B: Tensor
    """Negative log likelihood of each picture in nats per pixel value."""
    kl_B: Tensor
    """KL divergence of each picture in nats per code position."""
    stats_B6YX: Tensor
    """Decoder output: mu (3 channels) and ln b (3 channels) on the logit axis, fp32."""
    codes_BYX: Tensor
    """The true codes: argmax of the encoder's logits, int64."""


class Conv2d(nn.Module):
    """A convolution of stride 1 that keeps the picture's size. Parameters are fp32; products are computed in ``compute_dtype``."""

    def __init__(self, n_in: int, n_out: int, kernel: int, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.padding = (kernel - 1) // 2
        # A gain of 1 instead of He's sqrt(2), because the ReLUs are inside branches that contribute little to the output.
        self.w = nn.Parameter(normal(n_out, n_in, kernel, kernel, over=math.sqrt(n_in * kernel**2)))
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
            path[f"relu_{i + 1}"] = nn.ReLU(inplace=i > 0)  # not the first, whose input is also that of the identity path
            path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kernel, compute_dtype)
        self.id_path = Conv2d(n_in, n_out, 1, compute_dtype) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential(path)
        # A small gain: at initialisation the network is close to its identity paths, whatever its depth (paper 2.1).
        self.gain = gain
        self.recompute = False

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            y_BCYX: Tensor = checkpoint(self._forward, x_BCYX, use_reentrant=False, preserve_rng_state=False)
            return y_BCYX
        return self._forward(x_BCYX)

    def _forward(self, x_BCYX: Tensor) -> Tensor:
        return torch.add(self.id_path(x_BCYX), self.res_path(x_BCYX), alpha=self.gain)


def _group(cfg: DVAEConfig, n_in: int, n_out: int, kernels: Sequence[int], compute_dtype: torch.dtype) -> OrderedDict[str, nn.Module]:
    gain = 1 / (cfg.groups * cfg.blocks_per_group) ** 2
    widths = [n_in, *[n_out] * cfg.blocks_per_group]
    return OrderedDict((f"block_{i + 1}", ResidualBlock(widths[i], n_out, kernels, gain, compute_dtype)) for i in range(cfg.blocks_per_group))


def _output(n_in: int, n_out: int) -> nn.Sequential:
    # Always fp32: a mu in bf16 is off by up to 1/128, which would be costly where the likelihood is sharp (on a flat background).
    return nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_in, n_out, 1)))


class Encoder(nn.Module):
    """Mapped pixels [B, 3, S, S] -> code logits [B, N, S/f, S/f], fp32. The first log2(f) groups end in a pool."""

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        pools = cfg.downsample.bit_length() - 1
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, cfg.width, 7, compute_dtype))
        n_in = cfg.width
        for i in range(cfg.groups):
            group = _group(cfg, n_in, cfg.width * 2**i, (3, 3, 3, 1), compute_dtype)
            if i < pools:
                group["pool"] = nn.MaxPool2d(2) if cfg.pool == "max" else nn.AvgPool2d(2)
            blocks[f"group_{i + 1}"] = nn.Sequential(group)
            n_in = cfg.width * 2**i
        blocks["output"] = _output(n_in, cfg.vocab)
        self.blocks = nn.Sequential(blocks)
        self.image_size = cfg.image_size

    def forward(self, mapped_B3YX: Tensor) -> Tensor:
        """All logits at once: N values for each position. `DVAE` computes codes from the features without holding them all.

        Raises:
            ValueError: the pictures do not have the size dvae.image_size or not 3 channels.
        """
        last = self.blocks.get_submodule("output.conv")
        logits_BNYX: Tensor = last(self.features(mapped_B3YX))
        return logits_BNYX

    def features(self, mapped_B3YX: Tensor) -> Tensor:
        """The input of the last convolution, which computes the logits: [B, C, S/f, S/f].

        Raises:
            ValueError: as forward.
        """
        check_pixels(mapped_B3YX, self.image_size)
        x: Tensor = mapped_B3YX
        for module in list(self.blocks)[:-1]:
            x = module(x)
        return F.relu(x)

    @property
    def to_logits(self) -> tuple[Tensor, Tensor]:
        """Weight [N, C, 1, 1] and bias [N] of the last convolution."""
        last = self.blocks.get_submodule("output.conv")
        return last.w, last.b


class Decoder(nn.Module):
    """Codes as (relaxed) one-hot vectors [B, N, S/f, S/f] -> mu and ln b [B, 6, S, S], fp32. Mirrors the encoder's groups.

    The first 1x1 convolution is the codebook: column k of its weight is code vector k.
    """

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        ups = cfg.downsample.bit_length() - 1
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(cfg.vocab, cfg.init_width, 1))
        if ups == cfg.groups:
            # The encoder's last group works at twice the resolution of the grid, and so must its mirror image, the decoder's first group.
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

    @property
    def codebook(self) -> tuple[Tensor, Tensor]:
        """Weight [D, N, 1, 1] and bias [D] of the first convolution: the code vectors, and the bias that is added to each."""
        first = self.blocks.get_submodule("input")
        return first.w, first.b

    def from_vectors(self, x_BDYX: Tensor) -> Tensor:
        """Code vectors with the bias added -> mu and ln b [B, 6, S, S]: everything after the first convolution."""
        x = x_BDYX
        for module in list(self.blocks)[1:]:
            x = module(x)
        return x

    def from_codes(self, codes_BYX: Tensor) -> Tensor:
        """Equal to ``forward`` on the one-hot vectors of the codes, bit for bit, but looks the code vectors up instead of multiplying.

        Raises:
            ValueError: the codes are not integers [B, grid, grid].
        """
        check_codes(codes_BYX, self.grid)
        w, b_D = self.codebook
        x_BYXD = F.embedding(codes_BYX.long(), w[:, :, 0, 0].T) + b_D
        return self.from_vectors(x_BYXD.permute(0, 3, 1, 2))


class DVAE(ImageTokenizer):
    """Encoder and decoder with the training objective.

    Args:
        cfg: the sizes.
        compute_dtype: dtype of the convolutions' products. The 1x1 convolutions around the relaxation, the decoder's last convolution, the relaxation and the
            likelihood stay fp32 (paper A.3 and release).
        min_ln_b: lower bound of ln b in the likelihood; the paper has none (-inf). The density of exactly flat areas (drawings on white) is unbounded: without
            a bound they dominate the objective, and codes fall out of use.
    """

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32, min_ln_b: float = -math.inf) -> None:
        super().__init__(cfg)
        self.min_ln_b = min_ln_b
        self.encoder = Encoder(cfg, compute_dtype)
        self.decoder = Decoder(cfg, compute_dtype)

    def forward(self, pixels_B3YX: Tensor, noise: GumbelNoise | None, tau: float = 1.0) -> DVAETerms:
        """Both terms of the objective for pictures in [0, 1].

        Args:
            pixels_B3YX: fp32 pictures [B, 3, S, S] in [0, 1]; fastest in channels-last order.
            noise: noise of the relaxation; None decodes the true codes (argmax), and then no gradient reaches the encoder.
            tau: temperature of the relaxation; unused without noise.

        Raises:
            ValueError: the pictures do not have the size dvae.image_size, or the noise does not have one seed for each picture.
        """
        mapped_B3YX = map_pixels(pixels_B3YX)
        h_BCYX = self.encoder.features(mapped_B3YX)
        if noise is None:
            kl_BYX, codes_BYX = hard_codes(h_BCYX, self.encoder.to_logits)
            stats_B6YX = self.decoder.from_codes(codes_BYX)
        else:
            x_BDYX, kl_BYX, codes_BYX = relaxed_codes(h_BCYX, self.encoder.to_logits, self.decoder.codebook, noise, tau)
            stats_B6YX = self.decoder.from_vectors(x_BDYX)
        mu_B3YX, ln_b_B3YX = stats_B6YX.chunk(2, dim=1)
        nll_B = logit_laplace_nll(mapped_B3YX, mu_B3YX, ln_b_B3YX.clamp_min(self.min_ln_b)).mean((1, 2, 3))
        return DVAETerms(nll_B, kl_BYX.mean((1, 2)), stats_B6YX, codes_BYX)

    def _encode(self, pixels_B3YX: Tensor) -> Tensor:
        """The argmax of the logits (paper 2.2)."""
        return argmax_codes(self.encoder.features(map_pixels(pixels_B3YX)), self.encoder.to_logits)

    def _decode(self, codes_BYX: Tensor) -> Tensor:
        """The location of the likelihood; ln b is ignored (paper A.3)."""
        return pictures(self.decoder.from_codes(codes_BYX))

    def groups(self) -> list[nn.Module]:
        """The groups of residual blocks, which do nearly all of the arithmetic."""
        return [module for half in (self.encoder, self.decoder) for name, module in half.blocks.named_children() if name.startswith("group_")]

    def compile_groups(self, backend: str = "inductor") -> None:
        """Compile each group with torch.compile. The rest is not compiled, because blocks of noise and codes vary in shape."""
        for group in self.groups():
            group.compile(backend=backend, dynamic=False)

    def recompute_blocks(self) -> None:
        """Keep only the inputs of residual blocks for the backward pass, which computes their inner activations again."""
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.recompute = True


def pictures(stats_B6YX: Tensor) -> Tensor:
    """Decoder output -> pictures [B, 3, Y, X] in [0, 1]."""
    return unmap_pixels(torch.sigmoid(stats_B6YX[:, :3]))
