"""The networks whose features the Fréchet distance compares. Shapes: B batch, D features, Y X rows and columns; pictures in [0, 1].

Only the distance by one of the two Inception networks is called FID. With another network, the metric has the name of that network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from infra.errors import ConfigError, DataError
from train.evaluation import lite0
from train.evaluation.lite0 import resized
from train.evaluation.weight_files import read_weights

_KEY = "evaluate.frechet_weights"


@dataclass(frozen=True)
class FeatureNet:
    """A network that maps pictures to features."""

    metric: str
    """Name of the metric: the Fréchet distance of these features."""
    width: int
    features: Callable[[Tensor], Tensor]
    """Pictures [B, 3, Y, X] in [0, 1] -> [B, width]."""
    classes: Callable[[Tensor], Tensor] | None = None
    """Features [B, width] -> logits [B, classes]; None if the file has no classes."""
    score: str = "inception_score"
    """Name of the score that these classes give."""


def feature_net(name: str, weights: str, device: torch.device) -> FeatureNet:
    """Load the network that evaluate.frechet_net names.

    Raises:
        ConfigError: no weights are named, or a package that the network needs is not installed.
        DataError: the weights cannot be read.
    """
    return {"inception-cleanfid": _clean_fid, "inception-torch-fidelity": _torch_fidelity, "efficientnet-lite0": _lite0}[name](weights, device)


def _clean_fid(weights: str, device: torch.device) -> FeatureNet:
    """The Inception network of clean-fid, from its TorchScript file (inception-2015-12-05.pt), called as clean-fid's InceptionV3W does."""
    try:
        net = torch.jit.load(_file(weights), map_location=device).eval()
        layers = net.layers
    except (RuntimeError, AttributeError) as error:
        raise DataError(
            f"{weights}: not clean-fid's TorchScript of Inception ({' '.join(str(error).split())[:200]}); {_KEY} names inception-2015-12-05.pt."
        ) from error

    def features(pictures_B3YX: Tensor) -> Tensor:
        x_B3YX = resized(pictures_B3YX, 299) * 255
        return layers.forward((x_B3YX - 128) / 128).flatten(1)

    return FeatureNet("fid", 2048, features, _without_bias(net.output.weight) if hasattr(net, "output") else None)


def _torch_fidelity(weights: str, device: torch.device) -> FeatureNet:
    """The Inception network of torch-fidelity, which torchmetrics uses too, with its weights from a file."""
    module = _package("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=_file(weights)).to(device).eval()

    def features(pictures_B3YX: Tensor) -> Tensor:
        (found_BD,) = net((pictures_B3YX * 255).round().to(torch.uint8))
        return found_BD

    return FeatureNet("fid", 2048, features, _without_bias(net.fc.weight) if hasattr(net, "fc") else None)


def _lite0(weights: str, device: torch.device) -> FeatureNet:
    """The pooled features of EfficientNet-Lite0, whose weights come with packages: nothing is downloaded. A substitute: its distance is not FID."""
    needed_by = f"evaluate.frechet_net = '{lite0.NAME}'"
    path = weights or lite0.weights_file(needed_by)
    net = lite0.network(read_weights(path, _KEY), path, needed_by, f"{_KEY} names those of EfficientNet-Lite0")
    net = lite0.on_device(net, device)
    name = lite0.NAME.replace("-", "_")
    return FeatureNet(f"frechet_{name}", lite0.WIDTH, partial(lite0.features, net), net._fc, f"class_score_{name}")


def _without_bias(weight_CD: Tensor) -> Callable[[Tensor], Tensor]:
    """Inception's classes as the Inception Score takes them: the original program left the bias of the last layer out, and so do its successors."""
    weight_CD = weight_CD.detach().float()
    return lambda features_BD: F.linear(features_BD.to(weight_CD), weight_CD)


def _file(weights: str) -> str:
    if not weights:
        raise ConfigError(f"evaluate.frechet_net needs weights: name their file in {_KEY}.")
    if not Path(weights).is_file():
        raise DataError(f"{weights}: no such file ({_KEY}).")
    return weights


def _package(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"evaluate.frechet_net needs the package {package}: pip install {package}, or choose another network.") from error
