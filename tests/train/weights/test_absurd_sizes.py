"""Sizes that somebody else's package, export or checkpoint states are compared with what its files hold before memory is taken for them. About 4 s."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra import storage
from infra.digests import digest
from infra.errors import CheckpointError, ConfigError, ExitCode, ReportedError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support import drawable_run
from train.config import load_run
from train.drawing import captions, package, samples
from train.drawing.settings import Settings
from train.drawing.source import open_models
from train.run import inputs
from train.verbs import draw as verb
from train.weights import checkpoint, export
from train.weights.fragments import even_slice


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"))


@pytest.fixture
def packed(run: RunFolder, tmp_path: Path) -> Path:
    package.write(run.url, str(tmp_path / "package"))
    return tmp_path / "package"


def allocates_nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter of a module of more than 64 MB must be on the device 'meta'."""
    make = torch.nn.Parameter.__new__

    def watched(cls: Any, data: torch.Tensor | None = None, requires_grad: bool = True) -> Any:
        assert data is None or data.device.type == "meta" or data.numel() < 1 << 24, f"{data.numel():,} numbers were allocated"
        return make(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", watched)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        *(("dvae", "width", 1 << 16), ("dvae", "width", 1 << 50), ("dvae", "blocks_per_group", 40), ("dvae", "blocks_per_group", 1 << 40)),
        *(
            ("dvae", "image_size", 1 << 30),
            ("dalle", "width", 1 << 20),
            ("dalle", "width", 1 << 40),
            ("dalle", "layers", 40),
            ("dalle", "layers", 1 << 40),
        ),
        *(
            ("clip", "width", 1 << 20),
            ("clip", "layers", 10**9),
            ("clip", "embed", 1 << 20),
            ("tokenizer", "vocab", 1 << 40),
            ("tokenizer", "max_tokens", 1 << 40),
        ),
    ],
)
def test_a_package_of_absurd_sizes_is_refused_in_a_sentence_and_without_memory(
    section: str, key: str, value: int, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((packed / "config.json").read_text())
    config[section][key] = value
    (packed / "config.json").write_text(json.dumps(config))
    allocates_nothing_large(monkeypatch)
    with pytest.raises(ReportedError) as caught:
        open_models(str(packed), "cpu", rerank="clip")
    assert caught.value.exit_code in (ExitCode.DATA, ExitCode.CONFIG)
    assert key in str(caught.value) or "weights of another model" in str(caught.value)


def test_stages_compare_exports_before_they_take_memory(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    allocates_nothing_large(monkeypatch)
    cfg = load_run(run.url, [])
    for section, opened in (("dvae", inputs.open_dvae), ("clip", inputs.open_clip)):
        wide = cfg.model_copy(update={section: type(getattr(cfg, section))(**{**vars(getattr(cfg, section)), "width": 1 << 15})})
        with pytest.raises(CheckpointError, match="weights of another model"):
            opened(wide, run, torch.device("cpu"))
        module, identity = opened(cfg, run, torch.device("cpu"))
        assert identity == export.describe(run.at(section, "export"))["content_hash"]
        stored = export.read_tensors(run.at(section, "export"))[1]
        assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())


def test_a_foreign_judge_of_absurd_sizes_is_refused(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allocates_nothing_large(monkeypatch)
    for name, value in {"width": 1 << 20, "layers": 1 << 40, "embed": "many"}.items():
        judge = tmp_path / name
        shutil.copytree(storage.local_path(run.at("clip", "export")), judge)
        description = json.loads((judge / "config.json").read_text())
        description["model"][name] = value
        (judge / "config.json").write_text(json.dumps(description))
        with pytest.raises(ReportedError, match=r"weights of another model|no contrastive model"):
            open_models(run.url, "cpu", rerank=str(judge))


def test_weights_of_whole_numbers_are_no_weights(run: RunFolder, tmp_path: Path) -> None:
    place = tmp_path / "export"
    shutil.copytree(storage.local_path(run.at("dvae", "export")), place)
    tensors = load_file(place / export.WEIGHTS)
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, place / export.WEIGHTS)
    description = json.loads((place / export.DESCRIPTION).read_text()) | {"content_hash": checkpoint.content_hash(tensors)}
    (place / export.DESCRIPTION).write_text(json.dumps(description))
    module = inputs.open_dvae(load_run(run.url, []), run, torch.device("cpu"))[0]
    with pytest.raises(CheckpointError, match=f"'{name}' holds torch.int32, which are no weights"):
        export.read(str(place), module)


@pytest.mark.parametrize("size", [1 << 40, (1 << 53) - 1])
def test_a_checkpoint_that_claims_more_than_any_machine_has_is_damaged(size: int, tmp_path: Path) -> None:
    fragments = {"average/w": even_slice(torch.rand(8), 0, 1)}
    url = checkpoint.save(str(tmp_path), 1, fragments, {"shapes": {"w": [8]}}, World.single(), keep=1)
    index, meta = (json.loads((Path(url) / name).read_text()) for name in ("index.json", "meta.json"))
    index["tensors"]["average/w"]["size"] = size
    index["tensors"]["average/w"]["runs"][0] |= {"each": size, "last": size}
    del meta["sha256"]
    meta |= {"shapes": {"w": [size]}, "index": digest(index)}
    (Path(url) / "index.json").write_text(json.dumps(index))
    (Path(url) / "meta.json").write_text(json.dumps(meta | {"sha256": digest(meta)}))
    readers = (
        lambda: checkpoint.read_tensors(url, "average"),
        lambda: export.write(str(tmp_path / "out"), checkpoint.StoredTensors(url, "average"), {"width": 3}),
    )
    for read in readers:
        with pytest.raises(CheckpointError, match=rf"would take {4 * size:,} bytes, for which there is no room|does not hold of 'average/w'"):
            read()


@pytest.mark.parametrize("option", ["file", "image", "rerank", "out"])
def test_a_password_in_an_option_of_draw_is_refused_masked_and_before_anything_is_loaded(
    option: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verb, "open_place", lambda *given, **words: pytest.fail("models were opened"))
    for url in ("s3://AKIAEXAMPLE:hunter2secret@bucket/x", "https://u:hunter2secret@host/x", "https://host/x?X-Amz-Signature=hunter2secret"):
        given: dict[str, Any] = {option: url}
        with pytest.raises(ConfigError, match=rf"^--{option}: a URL may not carry a user, a password or a signature") as caught:
            verb.main(run.url, ["a red fox"], replace(verb.Options(out=str(tmp_path / "out")), **given), StopFlag())
        assert "hunter2" not in str(caught.value)
    assert "hunter2" not in "".join(capsys.readouterr()) and not list(tmp_path.rglob("*"))


def test_captions_with_odd_separators_are_one_line_of_a_file_and_of_what_is_recorded(tmp_path: Path) -> None:
    wanted = ["a red\u2028fox", "a blue\x85house", "two\x1ctrees"]
    (tmp_path / "captions.txt").write_text("\r\n".join(wanted) + "\r")
    assert captions.read_captions([], str(tmp_path / "captions.txt")) == wanted
    shaped = {
        "captions": 1,
        "each": 1,
        "place": 0,
        "window": 2,
        "threads": 1,
        "deterministic": False,
        "device": "cpu",
        "precision": "fp32",
        "torch": "2",
    }
    facts = {
        "schema": samples.SCHEMA,
        "key": "0" * 64,
        "seed": 0,
        "score": None,
        "sha256": "",
        "codes_sha256": "",
        "settings": Settings(n=3).shape(),
        "weights": {},
        "source": "",
    }
    lines = [facts | {"shaped_by": shaped, "caption": caption, "candidate": n, "file": f"{n:03d}.png"} for n, caption in enumerate(wanted)]
    samples.Folder(str(tmp_path), "0" * 64).write(lines)
    assert samples.Folder(str(tmp_path), "0" * 64).lines() == lines
