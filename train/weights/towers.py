"""The frozen towers of clip.towers = "frozen": EfficientNet-Lite0 looks at pictures, and MiniLM reads captions. Both come from packages; neither is trained here.

Shapes: B pairs, F features, Y X rows and columns; pictures in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from train.evaluation import lite0
from train.weights import minilm
from train.weights.checkpoint import content_hash
from train.weights.torch_file import open_tree, pairs, tensors_of

NETWORKS = frozenset({lite0.NAME, minilm.NAME})
KINDS = ("image_tower", "text_tower")
"""Their names in the lineage of what was trained on their features."""
INSTALL = f"{lite0.INSTALL}; {minilm.INSTALL}"
_NEEDED_BY = "clip.towers = 'frozen'"


@dataclass(frozen=True)
class Towers:
    """Two networks that turn pictures and captions into features."""

    image: Callable[[Tensor], Tensor]
    """Pictures [B, 3, Y, X] -> features [B, F]."""
    text: Callable[[Sequence[str]], Tensor]
    """Captions -> features [B, F]."""
    lineage: dict[str, str]
    """``KINDS`` -> content hash."""
    device: torch.device


def check() -> None:
    """
    Raises:
        ConfigError: a package is not installed.
    """
    lite0.weights_file(_NEEDED_BY)
    minilm.folder(_NEEDED_BY)


def open_towers(device: torch.device) -> Towers:
    """Read both networks.

    Raises:
        ConfigError: a package is not installed.
        DataError: a package is damaged.
    """
    check()
    path = lite0.weights_file(_NEEDED_BY)
    with open_tree(path, (), "weights of EfficientNet-Lite0") as tree:
        tensors = tensors_of(pairs(tree).items(), path)
    net = lite0.network(tensors, path, _NEEDED_BY, f"{lite0.INSTALL} --force-reinstall")
    net = lite0.faster(lite0.on_device(net, device))
    text = minilm.open_minilm(device, _NEEDED_BY)
    lineage = dict(zip(KINDS, (content_hash(tensors), text.identity), strict=True))
    return Towers(torch.no_grad()(partial(lite0.features, net)), text, lineage, device)
