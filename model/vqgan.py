"""The networks of VQGANs (Esser et al. 2021): those of taming-transformers, and those of LlamaGen, which differ in the names of weights and in the codebook only.

They are imported and never trained here, so there is no objective. Parameters have taming-transformers' names (``encoder.down.0.block.0.conv1.weight``);
train/weights/vqgan_files.py converts the others.

Shapes: B batch, N code vocabulary, C channels, Y X rows and columns (of pixels or of the code grid), D width of a code vector, R rows of a flat batch of vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import sdpa
from model.config import NORM_GROUPS, DVAEConfig
from model.image_tokenizer import ImageTokenizer

_DISTANCES_AT_ONCE = 1 << 26
"""Most distances between vectors and codes in memory: 256 MB."""


class _Conv(nn.Conv2d):
    """A convolution whose products are computed in ``compute_dtype``; parameters and results are fp32."""

    compute_dtype = torch.float32

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if self.compute_dtype == torch.float32:
            return super().forward(x_BCYX)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return self._conv_forward(x_BCYX.to(self.compute_dtype), self.weight.to(self.compute_dtype), bias).float()


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class _Residual(nn.Module):
    """Two normalised 3x3 convolutions beside the identity, or beside a 1x1 convolution where the number of channels changes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(n_in), _Conv(n_in, n_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(n_out), _Conv(n_out, n_out, 3, padding=1)
        if n_in != n_out:
            self.nin_shortcut = _Conv(n_in, n_out, 1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        h_BCYX = self.conv1(F.silu(self.norm1(x_BCYX)))
        h_BCYX = self.conv2(F.silu(self.norm2(h_BCYX)))
        kept_BCYX = self.nin_shortcut(x_BCYX) if hasattr(self, "nin_shortcut") else x_BCYX
        return kept_BCYX + h_BCYX


class _Attention(nn.Module):
    """Attention among all positions, with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (_Conv(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        h_BCYX = self.norm(x_BCYX)
        q, k, v = (part(h_BCYX).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        seen_B1SC = sdpa.attention(q, k, v)
        return x_BCYX + self.proj_out(seen_B1SC[:, 0].transpose(1, 2).unflatten(2, x_BCYX.shape[2:]))


class _Halve(nn.Module):
    """A convolution of stride 2. It pads below and on the right only, as the publishers do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels, 3, stride=2)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        y_BCYX: Tensor = self.conv(F.pad(x_BCYX, (0, 1, 0, 1)))
        return y_BCYX


class _Double(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _Conv(channels, channels, 3, padding=1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        y_BCYX: Tensor = self.conv(F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest"))
        return y_BCYX


class _Level(nn.Module):
    """The blocks at one resolution: residual blocks, each followed by attention if the level has it, and then the change of resolution."""

    def __init__(self, n_in: int, n_out: int, blocks: int, *, attends: bool, resample: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Residual(n_in if i == 0 else n_out, n_out) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(n_out) for _ in range(blocks if attends else 0))
        if resample == "downsample":
            self.downsample = _Halve(n_out)
        elif resample == "upsample":
            self.upsample = _Double(n_out)
        self.resample = resample

    def forward(self, x_BCYX: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCYX = block(x_BCYX)
            if len(self.attn):
                x_BCYX = self.attn[i](x_BCYX)
        return getattr(self, self.resample)(x_BCYX) if self.resample else x_BCYX


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = _Residual(channels, channels), _Attention(channels), _Residual(channels, channels)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        y_BCYX: Tensor = self.block_2(self.attn_1(self.block_1(x_BCYX)))
        return y_BCYX


class _Encoder(nn.Module):
    """Pictures in [-1, 1] -> latents."""

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        widths = [cfg.width * factor for factor in cfg.factors]
        self.conv_in = _Conv(3, cfg.width, 3, padding=1)
        self.down = nn.ModuleList(
            _Level(
                before,
                width,
                cfg.blocks_per_group,
                attends=level in cfg.attention,
                resample="downsample" if level < cfg.groups - 1 else "",
            )
            for level, (before, width) in enumerate(zip([cfg.width, *widths[:-1]], widths, strict=True))
        )
        self.mid = _Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _Conv(widths[-1], cfg.latent, 3, padding=1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x_BCYX = self.conv_in(x_BCYX)
        for level in self.down:
            x_BCYX = level(x_BCYX)
        y_BCYX: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x_BCYX))))
        return y_BCYX


class _Decoder(nn.Module):
    """Latents -> pictures in about [-1, 1]. Level i works at the resolution of the encoder's level i, so the last one comes first."""

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        widths = [cfg.width * factor for factor in cfg.factors]
        self.conv_in = _Conv(cfg.latent, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1])
        self.up = nn.ModuleList(
            _Level(before, width, cfg.blocks_per_group + 1, attends=level in cfg.attention, resample="upsample" if level else "")
            for level, (before, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out, self.conv_out = _norm(widths[0]), _Conv(widths[0], 3, 3, padding=1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        x_BCYX = self.mid(self.conv_in(x_BCYX))
        for level in reversed(self.up):
            x_BCYX = level(x_BCYX)
        y_BCYX: Tensor = self.conv_out(F.silu(self.norm_out(x_BCYX)))
        return y_BCYX


class _Codebook(nn.Module):
    """Chooses the codes of latents, and looks their vectors up. Always fp32."""

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        self.kind = cfg.codebook
        if cfg.codebook == "gumbel":
            self.proj = nn.Conv2d(cfg.latent, cfg.vocab, 1)
            self.embed = nn.Embedding(cfg.vocab, cfg.init_width)
        else:
            self.embedding = nn.Embedding(cfg.vocab, cfg.init_width)

    def codes(self, z_BDYX: Tensor) -> Tensor:
        """Latents [B, D, Y, X] -> codes [B, Y, X]."""
        size_BYX = (len(z_BDYX), *z_BDYX.shape[2:])
        rows_RD = z_BDYX.permute(0, 2, 3, 1).flatten(0, 2)
        if self.kind == "cosine":
            rows_RD = F.normalize(rows_RD, dim=-1)
        at_once = max(1, _DISTANCES_AT_ONCE // self._table.shape[0])
        return torch.cat([self._chosen(some_RD) for some_RD in rows_RD.split(at_once)]).view(size_BYX)

    def _chosen(self, rows_RD: Tensor) -> Tensor:
        if self.kind == "gumbel":
            return F.linear(rows_RD, self.proj.weight[:, :, 0, 0], self.proj.bias).argmax(1)
        table_ND = self._table
        # |z|^2 does not change which distance is smallest, but its rounding decides between vectors that are almost equally near; the publishers add it.
        distance_RN = rows_RD.square().sum(1, keepdim=True) + table_ND.square().sum(1) - 2 * (rows_RD @ table_ND.T)
        return distance_RN.argmin(1)

    def vectors(self, codes_BYX: Tensor) -> Tensor:
        """Codes [B, Y, X] -> their vectors [B, D, Y, X]."""
        return F.embedding(codes_BYX.long(), self._table).permute(0, 3, 1, 2)

    @property
    def _table(self) -> Tensor:
        if self.kind == "gumbel":
            return self.embed.weight
        return F.normalize(self.embedding.weight, dim=-1) if self.kind == "cosine" else self.embedding.weight


class Vqgan(ImageTokenizer):
    """Encoder, codebook and decoder.

    Args:
        cfg: the sizes; its ``kind`` is 'vqgan'.
        compute_dtype: dtype of the products of both networks' convolutions. The codebook and the convolutions beside it stay fp32.
    """

    def __init__(self, cfg: DVAEConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(cfg)
        self.encoder, self.decoder, self.quantize = _Encoder(cfg), _Decoder(cfg), _Codebook(cfg)
        self.quant_conv = nn.Conv2d(cfg.latent, cfg.init_width, 1)
        self.post_quant_conv = nn.Conv2d(cfg.init_width, cfg.latent, 1)
        for module in self.modules():
            if isinstance(module, _Conv):
                module.compute_dtype = compute_dtype

    def _encode(self, pixels_B3YX: Tensor) -> Tensor:
        return self.quantize.codes(self.quant_conv(self.encoder(2 * pixels_B3YX - 1)))

    def _decode(self, codes_BYX: Tensor) -> Tensor:
        drawn_B3YX: Tensor = self.decoder(self.post_quant_conv(self.quantize.vectors(codes_BYX)))
        return ((drawn_B3YX + 1) / 2).clamp(0, 1)
