"""LPIPS, the learned perceptual distance (Zhang et al. 2018, version 0.1), with weights from files. Shapes: B batch, C channels, Y X rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.errors import DataError
from train.evaluation.weight_files import read_weights

_KEY = "evaluate.lpips_weights"
# Convolutions of the trunks: index in torchvision's ``features``, stride, padding; 'pool' before the next; '*' marks outputs that are compared.
_ALEX = ((0, 4, 2, "*"), (3, 1, 2, "pool*"), (6, 1, 1, "pool*"), (8, 1, 1, "*"), (10, 1, 1, "*"))
_VGG = (
    *((0, 1, 1, ""), (2, 1, 1, "*"), (5, 1, 1, "pool"), (7, 1, 1, "*"), (10, 1, 1, "pool"), (12, 1, 1, ""), (14, 1, 1, "*")),
    *((17, 1, 1, "pool"), (19, 1, 1, ""), (21, 1, 1, "*"), (24, 1, 1, "pool"), (26, 1, 1, ""), (28, 1, 1, "*")),
)
_POOLS = {"alex": 3, "vgg": 2}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distance of pictures in [0, 1]: differences of unit-length features of five layers, weighted by channel.

    Args:
        tensors: weights of the trunk (``features.0.weight`` as in torchvision, or ``net.slice1.0.weight`` as in the lpips package) and of the heads
            (``lin0.model.1.weight``). The first convolution tells AlexNet and VGG-16 apart.

    Raises:
        DataError: weights are missing, or of neither network.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        found = {_plain(name): tensor for name, tensor in tensors.items()}
        first = found.get("0.weight")
        shape = None if first is None else tuple(first.shape)
        kinds = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}
        if shape not in kinds:
            raise DataError(f"the first convolution has the shape {shape}: {_KEY} takes AlexNet (64, 3, 11, 11) or VGG-16 (64, 3, 3, 3).")
        self.kind = kinds[shape]
        self.plan = _ALEX if self.kind == "alex" else _VGG
        heads = sum("*" in layer[3] for layer in self.plan)
        needed = [f"{layer[0]}.{part}" for layer in self.plan for part in ("weight", "bias")] + [f"lin{i}" for i in range(heads)]
        missing = [name for name in needed if name not in found]
        if missing:
            raise DataError(
                f"no weights for {', '.join(missing[:3])} of {self.kind}; {_KEY} names the trunk's file and the file of the linear heads."
            )
        for name in needed:
            self.register_buffer(name.replace(".", "_"), found[name].float())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    @classmethod
    def from_files(cls, paths: Sequence[str]) -> Lpips:
        """Weights of all files together.

        Raises:
            DataError: as read_weights and Lpips.
        """
        tensors: dict[str, Tensor] = {}
        for path in paths:
            tensors |= read_weights(path, _KEY)
        return cls(tensors)

    @torch.no_grad()
    def forward(self, a_B3YX: Tensor, b_B3YX: Tensor) -> Tensor:
        """LPIPS of each pair of pictures, [B]."""
        total_B = torch.zeros(len(a_B3YX), device=a_B3YX.device)
        for i, (x_BCYX, y_BCYX) in enumerate(zip(self._features(a_B3YX), self._features(b_B3YX), strict=True)):
            difference_BCYX = (_unit(x_BCYX) - _unit(y_BCYX)).square()
            total_B += F.conv2d(difference_BCYX, self.get_buffer(f"lin{i}")).mean((1, 2, 3))
        return total_B

    def _features(self, pictures_B3YX: Tensor) -> list[Tensor]:
        x = (2 * pictures_B3YX - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        outputs = []
        for index, stride, padding, marks in self.plan:
            if "pool" in marks:
                x = F.max_pool2d(x, _POOLS[self.kind], 2)
            x = F.relu(F.conv2d(x, self.get_buffer(f"{index}_weight"), self.get_buffer(f"{index}_bias"), stride=stride, padding=padding))
            if "*" in marks:
                outputs.append(x)
        return outputs


def _plain(name: str) -> str:
    """``features.3.bias``, ``net.slice2.3.bias`` -> ``3.bias``; ``lin2.model.1.weight`` -> ``lin2``; anything else as it is."""
    words = name.split(".")
    if words[0] == "features":
        return ".".join(words[1:])
    if words[0] == "net":
        return ".".join(words[2:])
    return words[0] if words[0].startswith("lin") and words[0] != "lins" else name


def _unit(x_BCYX: Tensor) -> Tensor:
    return x_BCYX / (x_BCYX.square().sum(1, keepdim=True).sqrt() + 1e-10)
