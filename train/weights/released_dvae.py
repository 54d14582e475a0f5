"""Reads the weights of the dVAE that OpenAI released (the ``dall-e`` package, docs/paper.md 2.4) from its pickled modules, without executing them
(train/weights/torch_file.py). They may hold modules or state dictionaries. Parameters have the same names in the release and here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from infra.errors import ConfigError
from model.config import DVAEConfig
from train.weights.pickle_tree import Call
from train.weights.torch_file import open_tree, pairs, tensors_of

HALVES = ("encoder", "decoder")
_MODULES = frozenset(
    {
        *("dall_e.encoder.Encoder", "dall_e.encoder.EncoderBlock", "dall_e.decoder.Decoder", "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d"),
        *("torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU", "torch.nn.modules.pooling.MaxPool2d"),
        *("torch.nn.modules.upsampling.Upsample", "torch.nn.modules.linear.Identity"),
    }
)

_MOST_MODULES = 10_000
"""The released halves have about a hundred each."""


@dataclass(frozen=True)
class Module:
    """One half of the dVAE, encoder or decoder, as read from a file."""

    tensors: dict[str, Tensor]
    """The parameters, by their names in the release, such as ``blocks.group_1.block_1.res_path.conv_1.w``."""
    names: frozenset[str]
    """Names of all submodules; empty if the file holds a state dictionary."""


def read_half(path: str) -> Module:
    """Tensors of a pickled ``Encoder`` or ``Decoder``, fp32. Nothing in the file is executed.

    Raises:
        DataError: the file is missing, damaged, or holds anything that such a module does not.
    """
    with open_tree(path, _MODULES, "a module of the dall-e package") as tree:
        names: set[str] = set()
        return Module(tensors_of(_named(tree, "", names), path), frozenset(names))


def join_halves(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the state dictionaries of the released encoder and decoder into one for our dVAE."""
    return {f"{half}.{name}": tensor for half, tensors in zip(HALVES, (encoder, decoder), strict=True) for name, tensor in tensors.items()}


def shape_of(encoder: Module, decoder: Module, cfg: DVAEConfig) -> DVAEConfig:
    """The model configuration of an encoder and a decoder, from the shapes of their tensors. The image size is taken from ``cfg``, and for state dictionaries
    also the kind of pooling and the downsampling, because their tensors do not show them.

    Raises:
        ConfigError: they are not an encoder and a decoder.
    """
    try:
        first, last = encoder.tensors["blocks.input.w"], encoder.tensors["blocks.output.conv.w"]
        codebook, statistics = decoder.tensors["blocks.input.w"], decoder.tensors["blocks.output.conv.w"]
        names = [name.split(".") for name in encoder.tensors]
        groups = len({words[1] for words in names if words[1].startswith("group_")})
        blocks = len({words[2] for words in names if words[1] == "group_1"})
    except (KeyError, IndexError) as error:
        raise ConfigError(f"no pair of encoder and decoder: '{error.args[0]}' is missing; give encoder.pkl first and decoder.pkl second.") from error
    if first.shape[1] != 3 or statistics.shape[0] != 6:
        raise ConfigError(
            f"an encoder takes 3 channels and a decoder gives 6, these take {first.shape[1]} and give {statistics.shape[0]}: "
            f"give encoder.pkl first and decoder.pkl second."
        )
    pools = sum(name.endswith(".pool") for name in encoder.names)
    return DVAEConfig(
        image_size=cfg.image_size,
        downsample=2**pools if pools else cfg.downsample,
        groups=groups,
        blocks_per_group=blocks,
        width=first.shape[0],
        init_width=codebook.shape[0],
        vocab=last.shape[0],
        pool="max" if pools else cfg.pool,
    )


def _named(tree: Any, prefix: str, names: set[str]) -> list[tuple[str, Any]]:
    """The parameters of a module's tree or of a state dictionary, as (name, value). Names of submodules are added to ``names``."""
    if isinstance(tree, Call) and str(tree.function) in _MODULES:
        # The state that BUILD sets: a dictionary of attributes, or from protocol 2 on a pair of that and the slots.
        state = pairs(tree.state[0] if isinstance(tree.state, tuple) else tree.state)
        found = [(f"{prefix}{name}", value) for name, value in pairs(state["_parameters"]).items()]
        for name, child in pairs(state["_modules"]).items():
            names.add(f"{prefix}{name}")
            if len(names) > _MOST_MODULES:  # modules that hold the next one twice are many with few bytes
                raise ValueError(f"more than {_MOST_MODULES} modules inside of each other")
            found += _named(child, f"{prefix}{name}.", names)
        return found
    return [(f"{prefix}{name}", value) for name, value in pairs(tree).items()]
