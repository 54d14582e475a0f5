"""Reads the weights of published VQGANs, without executing anything in their files: checkpoints of taming-transformers (its VQModel and GumbelVQ, with f8 and f16,
those of latent-diffusion included) and of LlamaGen (VQ-8, VQ-16), as torch or safetensors files. docs/image_tokenizers.md says where they are published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from infra import storage
from infra.errors import DataError
from model.config import NORM_GROUPS, DVAEConfig
from train.weights.pickle_tree import Call
from train.weights.torch_file import open_tree, pairs, tensors_of

_AROUND = frozenset(
    {
        "argparse.Namespace",
        *("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "pathlib.PosixPath"),
    }
)
"""Names that stand beside the weights in a training's checkpoint. They are never imported."""
_HOLDERS = ("ema", "model", "state_dict")
"""Under which key a checkpoint has the weights; the first that it has, as LlamaGen's own programs read it."""
_UNUSED = ("loss.", "quantize.codebook_used", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")
"""Tensors that only training needs: perceptual loss and discriminator, and statistics of the codebook."""
_LLAMAGEN = (
    (r"^(encoder|decoder)\.mid\.0\.", r"\1.mid.block_1."),
    (r"^(encoder|decoder)\.mid\.1\.", r"\1.mid.attn_1."),
    (r"^(encoder|decoder)\.mid\.2\.", r"\1.mid.block_2."),
    (r"^(encoder\.)conv_blocks\.(\d+)\.", r"\1down.\2."),
    (r"^(decoder\.)conv_blocks\.(\d+)\.", r"\1up.\2."),
    (r"^((?:encoder\.down|decoder\.up)\.\d+\.)res\.", r"\1block."),
)
_DOWN, _UP = re.compile(r"^encoder\.down\.(\d{1,9})\.(block|attn)\.(\d{1,9})\."), re.compile(r"^decoder\.up\.(\d{1,9})\.")
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_CONVOLUTION, _TABLE = 4, 2
"""Dimensions of weights."""


class Weights:
    """A VQGAN's tensors under taming-transformers' names, without what only training needs."""

    def __init__(self, tensors: dict[str, Tensor], path: str) -> None:
        self.path = path
        self.is_llamagen = any(name.startswith("encoder.conv_blocks.") for name in tensors)
        self.tensors = _renamed(tensors) if self.is_llamagen else tensors

    def shape(self, cfg: DVAEConfig) -> DVAEConfig:
        """The sizes that the tensors show. The size of pictures, which they do not show, is taken from ``cfg``.

        Raises:
            DataError: they are not a VQGAN that is supported; the message says why.
        """
        self._refuse_others()
        first, latent = self._size("encoder.conv_in.weight", _CONVOLUTION), self._size("encoder.conv_out.weight", _CONVOLUTION)[0]
        found = [(int(match[1]), match[2], int(match[3])) for name in self.tensors if (match := _DOWN.match(name))]
        groups = 1 + max(level for level, _, _ in found) if found else 0
        channels = [self._size(f"encoder.down.{level}.block.0.conv2.weight", _CONVOLUTION)[0] for level in range(groups)]
        width = first[0]
        if first[1] != 3 or not channels or not width or any(count % width for count in channels) or width % NORM_GROUPS:
            raise DataError(
                f"{self.path}: an encoder from {first[1]} channels with groups of {channels} channels after {width}: accepted are VQGANs of pictures (3 "
                f"channels) whose groups have multiples of the first convolution's channels, and these a multiple of {NORM_GROUPS}."
            )
        is_gumbel = "quantize.proj.weight" in self.tensors
        vocab, vector = self._size("quantize.embed.weight" if is_gumbel else "quantize.embedding.weight", _TABLE)
        try:
            return DVAEConfig(
                kind="vqgan",
                image_size=cfg.image_size,
                downsample=2 ** (groups - 1),
                groups=groups,
                blocks_per_group=1 + max(block for level, kind, block in found if level == 0 and kind == "block"),
                width=width,
                init_width=vector,
                vocab=vocab,
                pool=cfg.pool,
                factors=tuple(count // width for count in channels),
                attention=tuple(sorted({level for level, kind, _ in found if kind == "attn"})),
                latent=latent,
                codebook="gumbel" if is_gumbel else "cosine" if self.is_llamagen else "nearest",
            )
        except ValueError as error:
            raise DataError(f"{self.path}: a VQGAN of a shape that is not supported: {error}.") from error

    def _refuse_others(self) -> None:
        names = self.tensors.keys()
        if "quantize.used" in names:
            raise DataError(f"{self.path}: numbers its codes anew (remap, 'quantize.used'), which is not supported; use the VQGAN without it.")
        if "colorize" in names:
            raise DataError(f"{self.path}: a VQGAN of segmentation maps ('colorize'), which draws no pictures.")
        if not any(name.startswith("quantize.") for name in names) and "quant_conv.weight" in names:
            raise DataError(
                f"{self.path}: an autoencoder without a codebook (continuous latents, KL), which has no codes for a transformer to learn."
            )
        if any("running_mean" in name for name in names):
            raise DataError(f"{self.path}: batch normalisation, which is not supported; the published VQGANs have group normalisation.")

    def _size(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.tensors:
            odd = ", ".join(sorted(self.tensors)[:3])
            raise DataError(
                f"{self.path}: no VQGAN of taming-transformers or LlamaGen: '{name}' is missing; it has {len(self.tensors)} tensors: {odd}, ..."
            )
        size = tuple(self.tensors[name].shape)
        if len(size) != dimensions:
            raise DataError(
                f"{self.path}: no VQGAN of taming-transformers or LlamaGen: '{name}' has the shape {list(size)}, where {dimensions} sizes belong."
            )
        return size


def read_vqgan(path: str) -> Weights:
    """The weights of a file, fp32. Nothing in the file is executed.

    Raises:
        DataError: the file is missing, damaged, or holds anything that such a checkpoint does not.
    """
    return Weights(_safetensors(path) if path.endswith(".safetensors") else _checkpoint(path), path)


def _safetensors(path: str) -> dict[str, Tensor]:
    if storage.is_remote(path) or not Path(path).is_file():
        raise DataError(f"{path}: cannot be read: published weights are read from a file on a disk, and there is none.")
    try:
        found = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(_UNUSED)}
    except (SafetensorError, OSError, LookupError, RuntimeError) as error:
        raise DataError(f"{path}: damaged, or not a safetensors file ({' '.join(str(error).split())[:200]}).") from error
    if odd := next((name for name, tensor in found.items() if tensor.dtype not in _NUMBERS), ""):
        kind = str(found[odd].dtype).removeprefix("torch.")
        raise DataError(f"{path}: '{odd}' holds numbers of the kind {kind}: accepted are float32, float16, bfloat16 and float64.")
    return {name: tensor.float() for name, tensor in found.items()}


def _checkpoint(path: str) -> dict[str, Tensor]:
    with open_tree(path, _AROUND, "a VQGAN's checkpoint") as tree:
        entries = pairs(tree)
        holder = next((key for key in _HOLDERS if _holds_tensors(entries.get(key))), None)
        named = pairs(entries[holder]) if holder is not None else entries
        return tensors_of(((name, value) for name, value in named.items() if isinstance(name, str) and not name.startswith(_UNUSED)), path)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict | Call) and any(isinstance(item, Call) for item in pairs(value).values())


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LlamaGen's tensors under taming-transformers' names. LlamaGen counts the decoder's levels from the codes, taming-transformers from the pixels."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _LLAMAGEN:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    levels = [int(match[1]) for name in out if (match := _UP.match(name))]
    last = max(levels, default=0)
    return {_UP.sub(lambda match: f"decoder.up.{last - int(match[1])}.", name): tensor for name, tensor in out.items()}
