"""VQGANs as taming-transformers and LlamaGen publish them, at small widths with seeded random weights: their tensors by name, and plain functions of these
tensors, written without our modules, that encode and decode."""

from __future__ import annotations

import argparse
import collections
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, LATENT, VOCAB, BLOCKS = 32, 16, 512, 2
FACTORS = {
    "taming f16": (1, 1, 2, 2, 4),
    "taming f8": (1, 2, 2, 4),
    "taming gumbel f8": (1, 1, 2, 4),
    "LlamaGen VQ-16": (1, 1, 2, 2, 4),
    "LlamaGen VQ-8": (1, 2, 2, 4),
}
NARROW = "taming narrow"
"""As small as f8 can be, for whole runs."""


class Published:
    """One layout. A tensor is made when it is first used, so whoever has encoded and decoded once has them all."""

    def __init__(self, layout: str, seed: int = 0) -> None:
        self.layout, self.factors = layout, FACTORS.get(layout, (1, 1, 1, 1))
        self.is_llamagen, self.is_gumbel = layout.startswith("LlamaGen"), "gumbel" in layout
        self.vector = LATENT if self.is_gumbel else 8
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self.decode(self.encode(torch.zeros(1, 3, 16, 16)))

    def encode(self, pixels_B3YX: Tensor) -> Tensor:
        """Pictures in [0, 1] to codes."""
        x, last = self._conv("encoder.conv_in", 2 * pixels_B3YX - 1, WIDTH), len(self.factors) - 1
        for level, factor in enumerate(self.factors):
            name = f"encoder.{'conv_blocks' if self.is_llamagen else 'down'}.{level}"
            x = self._level(name, x, WIDTH * factor, BLOCKS, attends=level == last)
            if level < last:
                x = self._conv(f"{name}.downsample.conv", F.pad(x, (0, 1, 0, 1)), x.shape[1], stride=2, padding=0)
        z = self._conv("quant_conv", self._end("encoder", self._middle("encoder", x), LATENT), self.vector, 1, padding=0).permute(0, 2, 3, 1)
        if self.is_gumbel:
            return self._conv("quantize.proj", z.permute(0, 3, 1, 2), VOCAB, 1, padding=0).argmax(1)
        table = self._table()
        z = F.normalize(z, dim=-1) if self.is_llamagen else z
        distance = z.square().sum(-1, keepdim=True) + table.square().sum(1) - 2 * z @ table.T
        return distance.argmin(-1)

    def decode(self, codes_BYX: Tensor) -> Tensor:
        """Codes to pictures, not clamped."""
        x = self._conv("post_quant_conv", self._table()[codes_BYX].permute(0, 3, 1, 2), LATENT, 1, padding=0)
        last = len(self.factors) - 1
        x = self._middle("decoder", self._conv("decoder.conv_in", x, WIDTH * self.factors[-1]))
        for level in reversed(range(last + 1)):
            name = f"decoder.conv_blocks.{last - level}" if self.is_llamagen else f"decoder.up.{level}"
            x = self._level(name, x, WIDTH * self.factors[level], BLOCKS + 1, attends=level == last)
            if level:
                x = self._conv(f"{name}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3), x.shape[1])
        return (self._end("decoder", x, 3) + 1) / 2

    def _weight(self, name: str, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        if name not in self.tensors:
            self.tensors[name] = offset + scale * torch.randn(*shape, generator=self._generator)
        assert self.tensors[name].shape == shape
        return self.tensors[name]

    def _conv(self, name: str, x: Tensor, n_out: int, kernel: int = 3, *, stride: int = 1, padding: int = 1) -> Tensor:
        n_in = x.shape[1]
        w = self._weight(f"{name}.weight", n_out, n_in, kernel, kernel, scale=(n_in * kernel**2) ** -0.5)
        return F.conv2d(x, w, self._weight(f"{name}.bias", n_out, scale=0.1), stride, padding)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        w = self._weight(f"{name}.weight", x.shape[1], scale=0.1, offset=1.0)
        grouped = x.reshape(len(x), 32, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
        normal = ((grouped - mean) / (variance + 1e-6).sqrt()).view(x.shape)
        return normal * w[:, None, None] + self._weight(f"{name}.bias", x.shape[1], scale=0.1)[:, None, None]

    def _residual(self, name: str, x: Tensor, n_out: int) -> Tensor:
        h = self._conv(f"{name}.conv1", _swish(self._norm(f"{name}.norm1", x)), n_out)
        h = self._conv(f"{name}.conv2", _swish(self._norm(f"{name}.norm2", h)), n_out)
        return h + (x if x.shape[1] == n_out else self._conv(f"{name}.nin_shortcut", x, n_out, 1, padding=0))

    def _attention(self, name: str, x: Tensor) -> Tensor:
        h = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", h, x.shape[1], 1, padding=0).flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(2)
        return x + self._conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view(x.shape), x.shape[1], 1, padding=0)

    def _level(self, name: str, x: Tensor, n_out: int, blocks: int, *, attends: bool) -> Tensor:
        for i in range(blocks):
            x = self._residual(f"{name}.{'res' if self.is_llamagen else 'block'}.{i}", x, n_out)
            x = self._attention(f"{name}.attn.{i}", x) if attends else x
        return x

    def _middle(self, half: str, x: Tensor) -> Tensor:
        names = ("0", "1", "2") if self.is_llamagen else ("block_1", "attn_1", "block_2")
        x = self._attention(f"{half}.mid.{names[1]}", self._residual(f"{half}.mid.{names[0]}", x, x.shape[1]))
        return self._residual(f"{half}.mid.{names[2]}", x, x.shape[1])

    def _end(self, half: str, x: Tensor, n_out: int) -> Tensor:
        return self._conv(f"{half}.conv_out", _swish(self._norm(f"{half}.norm_out", x)), n_out)

    def _table(self) -> Tensor:
        table = self._weight("quantize.embed.weight" if self.is_gumbel else "quantize.embedding.weight", VOCAB, self.vector)
        return F.normalize(table, dim=-1) if self.is_llamagen else table

    def write(self, path: Path) -> str:
        """A checkpoint as the publisher's training writes it, with what stands in it beside the weights; or a safetensors file, by the ending of the name."""
        beside = {"loss.discriminator.main.0.weight": torch.ones(2), "loss.perceptual_loss.lin0.model.1.weight": torch.ones(2)}
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, path)
        elif self.is_llamagen:
            weights = collections.OrderedDict(self.tensors | {"quantize.codebook_used": torch.zeros(65536)})
            arguments = argparse.Namespace(vq_model=self.layout, codebook_size=VOCAB)
            torch.save({"model": weights, "optimizer": {"state": {}}, "discriminator": beside, "steps": 7, "args": arguments}, path)
        else:
            with pytest.MonkeyPatch.context() as patch:
                callbacks = {_lightning(patch): {"best_model_score": torch.tensor(0.5), "best_model_path": "x"}}
                torch.save({"epoch": 1, "callbacks": callbacks, "state_dict": collections.OrderedDict(self.tensors | beside)}, path)
        return str(path)

    def words(self, size: int) -> list[str]:
        """The overrides that describe it."""
        groups = len(self.factors)
        values: dict[str, Any] = {"kind": "vqgan", "image_size": size, "downsample": 2 ** (groups - 1), "groups": groups, "width": WIDTH}
        values |= {"init_width": self.vector, "vocab": VOCAB, "factors": list(self.factors), "attention": [groups - 1], "latent": LATENT}
        values |= {"blocks_per_group": BLOCKS, "codebook": "gumbel" if self.is_gumbel else "cosine" if self.is_llamagen else "nearest"}
        return [f"dvae.{key}={value}" for key, value in values.items()]


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _lightning(patch: pytest.MonkeyPatch) -> type:
    """The class that names a callback in checkpoints of PyTorch Lightning."""
    found = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = types.ModuleType(found.__module__)
    module.ModelCheckpoint = found  # type: ignore[attr-defined]
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        patch.setitem(sys.modules, name, types.ModuleType(name))
    patch.setitem(sys.modules, found.__module__, module)
    return found
