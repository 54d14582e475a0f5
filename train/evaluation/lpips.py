"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1). Computed by the package ``lpips`` with weights from files; nothing is downloaded."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from infra.errors import ConfigError, DataError
from train.evaluation.weight_files import read_weights

_KEY = "evaluate.lpips_weights"
_KINDS = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
"""Shape of the first convolution -> the network that has it."""


class Lpips(nn.Module):
    """The distance of pictures with values in [0, 1]: squared differences of the normalised features of five layers, weighted by channel.

    Args:
        tensors: weights of the trunk (``features.0.weight`` as in torchvision, or ``net.slice1.0.weight`` as in the lpips package) and of the heads
            (``lin0.model.1.weight``). The first convolution tells AlexNet and VGG-16 apart.

    Raises:
        ConfigError: the package is not installed.
        DataError: weights are missing, or do not belong to one of the two networks.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        found = {_plain(name): tensor for name, tensor in tensors.items()}
        first = found.get("0.weight")
        shape = None if first is None else tuple(first.shape)
        if shape not in _KINDS:
            raise DataError(f"the first convolution has the shape {shape}: {_KEY} takes AlexNet (64, 3, 11, 11) or VGG-16 (64, 3, 3, 3).")
        kind = _KINDS[shape]
        try:
            import lpips  # imported here because it is optional and takes long to import
        except ImportError as error:
            raise ConfigError(f"{_KEY} needs the package lpips, which is optional: pip install 'lpips>=0.1.4,<0.2' scipy ({error}).") from error
        self.model: nn.Module = lpips.LPIPS(pretrained=False, pnet_rand=True, net=kind, verbose=False)  # random weights, all replaced below
        wanted = {name: _plain(name) for name, _ in self.model.named_parameters()}
        missing = list(dict.fromkeys(plain for plain in wanted.values() if plain not in found))
        if missing:
            raise DataError(f"no weights for {', '.join(missing[:3])} of {kind}; {_KEY} names the trunk's file and the file of the linear heads.")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(found[wanted[name]]).requires_grad_(False)

    @classmethod
    def from_files(cls, paths: Sequence[str]) -> Lpips:
        """Read the weights from several files, which together must hold all.

        Raises:
            ConfigError: see Lpips.
            DataError: see read_weights and Lpips.
        """
        tensors: dict[str, Tensor] = {}
        for path in paths:
            tensors |= read_weights(path, _KEY)
        return cls(tensors)

    @torch.no_grad()
    def forward(self, a_B3YX: Tensor, b_B3YX: Tensor) -> Tensor:
        """The distance of each pair of pictures, [B]."""
        distance_B111: Tensor = self.model(a_B3YX, b_B3YX, normalize=True)
        return distance_B111.flatten()


def _plain(name: str) -> str:
    """``features.3.bias``, ``net.slice2.3.bias`` -> ``3.bias``; ``lin2.model.1.weight``, ``lins.2.model.1.weight`` -> ``lin2``; anything else as it is."""
    trunk = re.fullmatch(r"(?:features|net\.slice\d+)\.(\d+\.\w+)", name)
    head = re.fullmatch(r"lins?\.?(\d+)\..*", name)
    return trunk[1] if trunk else f"lin{head[1]}" if head else name
