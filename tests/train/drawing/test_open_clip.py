"""Models of open_clip as what ranks, with seeded random weights in the published layout. About 3 s, and as long again for open_clip's import."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from infra.errors import CheckpointError, ConfigError, DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support import drawable_run
from train.drawing import open_clip_folder
from train.drawing.settings import Settings
from train.drawing.source import open_judge, open_models
from train.verbs import draw as verb

open_clip = pytest.importorskip("open_clip")
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.model.CLIP(**SIZES).eval()


def published(folder: Path, model: Any, sizes: dict[str, Any] = SIZES, name: str = "open_clip_model.safetensors") -> str:
    """The layout of the hub: what open_clip's own push_to_hf_hub writes."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": sizes, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}})
    )
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"))


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
@torch.no_grad()
def test_vectors_are_those_of_open_clip_with_its_own_preprocessing(name: str, model: Any, tmp_path: Path) -> None:
    ranker, identity = open_clip_folder.open_folder(published(tmp_path / "clip", model, name=name), CPU)
    pixels_YXC = np.asarray(Image.open(drawable_run.picture_file(tmp_path / "a.png", (48, 48))))
    prepare = open_clip.transform.image_transform(32, is_train=False, mean=(0.5, 0.4, 0.3), std=(0.3, 0.2, 0.1))
    wanted = model.encode_image(prepare(Image.fromarray(pixels_YXC))[None], normalize=True)
    found = ranker.encode_image(torch.from_numpy(pixels_YXC.copy()).permute(2, 0, 1)[None].float() / 255)
    assert float((found * wanted).sum()) > 0.9999, "open_clip's own rounds the scaled picture to bytes"
    words = "A red fox's den, and more words than fit into the twelve pieces"
    text = model.encode_text(open_clip.tokenizer.SimpleTokenizer(context_length=12)([words]), normalize=True)
    torch.testing.assert_close(ranker.encode_caption(words), text)
    assert len(identity) == 64


def test_it_ranks_what_draw_draws_and_judges_drawings(run: RunFolder, model: Any, tmp_path: Path) -> None:
    folder = published(tmp_path / "clip", model)
    verb.main(run.url, ["a red fox"], verb.Options(Settings(n=3), rerank=folder, out=str(tmp_path / "out")), StopFlag())
    (table,) = (tmp_path / "out").glob("*/samples.jsonl")
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    models = open_models(run.url, rerank=folder)
    judge, identity = open_judge(run.url, folder, models.lineage["tokenizer"], CPU)
    assert {line["weights"]["clip"] for line in lines} == {identity} == {models.lineage["clip"]}
    with torch.no_grad():
        for line in lines:
            pixels_YXC = np.asarray(Image.open(table.parent / line["file"]).convert("RGB"))
            image_1E = judge.encode_image(torch.from_numpy(pixels_YXC.copy()).permute(2, 0, 1)[None].float() / 255)
            assert line["score"] == pytest.approx(float(image_1E @ judge.encode_caption("a red fox").T), abs=1e-5)
    assert len({line["score"] for line in lines}) == 3


class Trap:
    def __reduce__(self) -> Any:
        return open, ("trap", "w")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"vision_cfg": SIZES["vision_cfg"] | {"timm_model_name": "vit"}}, DataError, "model_cfg.vision_cfg.timm_model_name: extra inputs"),
        ({"text_cfg": SIZES["text_cfg"] | {"hf_model_name": "a/b"}}, DataError, "model_cfg.text_cfg.hf_model_name: extra inputs"),
        (
            {"vision_cfg": SIZES["vision_cfg"] | {"layers": 10**9}},
            DataError,
            "model_cfg.vision_cfg.layers: input should be less than or equal to 256",
        ),
        ({"vision_cfg": SIZES["vision_cfg"] | {"layers": [3, 4, 6, 3]}}, DataError, "model_cfg.vision_cfg.layers: input should be a valid integer"),
        ({"text_cfg": SIZES["text_cfg"] | {"width": 1 << 15}}, CheckpointError, "weights of another model: '.*' is"),
    ],
)
def test_other_architectures_and_absurd_sizes_are_refused(
    change: dict[str, Any], error: type[Exception], message: str, model: Any, tmp_path: Path
) -> None:
    folder = published(tmp_path / "clip", model, SIZES | change)
    with pytest.raises(error, match=message):
        open_clip_folder.open_folder(folder, CPU)


def test_a_vocabulary_of_other_pieces_is_refused(tmp_path: Path) -> None:
    sizes = SIZES | {"text_cfg": SIZES["text_cfg"] | {"vocab_size": 100}}
    folder = published(tmp_path / "clip", open_clip.model.CLIP(**sizes), sizes)
    with pytest.raises(ConfigError, match=r"text_cfg\.vocab_size = 100; CLIP's own 49,408 pieces of words are accepted"):
        open_clip_folder.open_folder(folder, CPU)


def test_nothing_in_a_file_is_executed_and_what_is_missing_is_said(
    run: RunFolder, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = published(tmp_path / "clip", model)
    weights = tmp_path / "clip" / "open_clip_model.safetensors"
    weights.unlink()
    with pytest.raises(ConfigError, match=r"open_clip_config\.json is there, and no weights; accepted are open_clip_model\.safetensors"):
        open_models(run.url, rerank=folder)
    (tmp_path / "clip" / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps({"visual.proj": Trap()}))
    with pytest.raises(DataError, match=r"open_clip_pytorch_model\.bin: .*(io|builtins)\.open"):
        open_models(run.url, rerank=folder)
    assert not (tmp_path / "trap").exists()
    with pytest.raises(ConfigError, match="read from a local folder; copy it to one"):
        open_clip_folder.check("s3://bucket/clip", "rerank")
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ConfigError, match="needs the package open-clip-torch: pip install open-clip-torch"):
        open_models(run.url, rerank=folder)
