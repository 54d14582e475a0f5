"""A published CLIP of open_clip as what ranks: a folder in the layout of the Hugging Face hub, with open_clip_config.json and the weights beside it.

Only the plain architecture is opened (a vision transformer, a causal text transformer, CLIP's own pieces of words): others name networks or tokenizers that
open_clip would download. Files may come from anybody: nothing in them is executed, and sizes are compared with the tensors before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from infra import storage, stored
from infra.errors import ConfigError
from train.evaluation.weight_files import read_weights
from train.weights import export
from train.weights.checkpoint import content_hash
from train.weights.torch_file import open_tree, pairs, tensors_of

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

_Size = Annotated[int, Field(ge=1, le=1 << 16)]
_Layers = Annotated[int, Field(ge=1, le=256)]
_Three = Annotated[list[stored.Number], Field(min_length=3, max_length=3)]


class _Known(stored.Stored):
    """A part of the configuration of which every key is known: an unknown one may name another architecture."""

    model_config = ConfigDict(extra="forbid")


class _Vision(_Known):
    image_size: _Size
    layers: _Layers
    width: _Size
    patch_size: _Size
    head_width: _Size = 64
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0


class _Text(_Known):
    context_length: Annotated[int, Field(ge=3, le=1 << 12)]
    vocab_size: Annotated[int, Field(ge=1, le=1 << 20)]
    width: _Size
    heads: _Size
    layers: _Layers
    mlp_ratio: Annotated[float, Field(gt=0, le=64)] = 4.0


class _Model(_Known):
    embed_dim: _Size
    vision_cfg: _Vision
    text_cfg: _Text
    quick_gelu: bool = False


class _Preprocess(stored.Stored):
    """As open_clip's own defaults are: the statistics of OpenAI's pictures."""

    mean: _Three = Field(default=[0.48145466, 0.4578275, 0.40821073])
    std: _Three = Field(default=[0.26862954, 0.26130258, 0.27577711])


class _Config(stored.Stored):
    model_cfg: _Model
    preprocess_cfg: _Preprocess = Field(default_factory=_Preprocess)


@dataclass(frozen=True)
class OpenClip:
    """An open_clip model that is ready to rank."""

    model: Any
    tokenize: Callable[[str], Tensor]
    size: int
    mean_311: Tensor
    std_311: Tensor

    @property
    def networks(self) -> frozenset[str]:
        return frozenset()

    def encode_image(self, pixels_B3YX: Tensor) -> Tensor:
        """Pictures are scaled as open_clip's preprocessing does, by cubic interpolation."""
        scaled_B3YX = F.interpolate(pixels_B3YX, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return self.model.encode_image((scaled_B3YX - self.mean_311) / self.std_311, normalize=True).float()

    def encode_caption(self, caption: str) -> Tensor:
        return self.model.encode_text(self.tokenize(caption).to(self.mean_311.device), normalize=True).float()


def is_there(folder: str) -> bool:
    """Whether a folder is in this layout."""
    return storage.exists(storage.join(folder, CONFIG))


def check(folder: str, key: str) -> dict[str, Any]:
    """The configuration of a folder, checked without reading its weights.

    Raises:
        ConfigError: the package is not installed, or there are no weights, or they are not on this machine.
        DataError: the configuration is damaged, or of another architecture.
    """
    if storage.is_remote(folder):
        raise ConfigError(f"{key} '{folder}': a model of open_clip is read from a local folder; copy it to one.")
    try:
        import_module("open_clip")
    except ImportError as error:
        raise ConfigError(f"{key} '{folder}': needs the package open-clip-torch: pip install open-clip-torch.") from error
    _weights(folder, key)
    remedy = "plain CLIPs are accepted (vision and text transformers, without keys for other networks or tokenizers), such as ViT-B-32"
    return stored.read(storage.join(folder, CONFIG), _Config, remedy)


def _weights(folder: str, key: str) -> str:
    for name in WEIGHTS:
        if storage.exists(storage.join(folder, name)):
            return str(storage.local_path(storage.join(folder, name)))
    raise ConfigError(f"{key} '{folder}': {CONFIG} is there, and no weights; accepted are {', '.join(WEIGHTS)}.")


def _tensors(path: str, key: str) -> dict[str, Tensor]:
    """
    Raises:
        DataError: the file holds something else, or more than tensors by name.
    """
    if path.endswith(".safetensors"):
        return read_weights(path, key)
    with open_tree(path, (), "weights of a model of open_clip") as tree:
        return tensors_of(pairs(tree).items(), path)


def open_folder(folder: str, device: torch.device, key: str = "rerank") -> tuple[OpenClip, str]:
    """Open a model, and return it with the content hash of its weights.

    Raises:
        ConfigError, DataError: as ``check``.
        CheckpointError: the weights are those of another configuration.
    """
    config = _Config.model_validate(check(folder, key))
    tensors = _tensors(_weights(folder, key), key)
    sizes = config.model_cfg.model_dump()
    build, pieces = import_module("open_clip.model").CLIP, import_module("open_clip.tokenizer").SimpleTokenizer
    with torch.device("meta"):
        export.check_shapes(folder, build(**sizes), tensors)
    model = build(**sizes)
    model.load_state_dict(tensors)
    text = config.model_cfg.text_cfg
    tokenizer = pieces(context_length=text.context_length)
    if text.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"{key} '{folder}': text_cfg.vocab_size = {text.vocab_size:,}; CLIP's own {tokenizer.vocab_size:,} pieces of words are accepted."
        )
    mean_311, std_311 = (torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1) for values in vars(config.preprocess_cfg).values())
    ready = export.to_device(model, device)
    return OpenClip(ready, lambda caption: tokenizer([caption]), config.model_cfg.vision_cfg.image_size, mean_311, std_311), content_hash(tensors)
