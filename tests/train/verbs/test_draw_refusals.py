"""``launcher.py draw`` refuses what is wrong before it reads weights, which takes most of the time until the first picture. Seconds: about 3."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import storage
from infra.errors import ConfigError, DataError, ReportedError, UsageError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.clip import Clip
from tests.support import drawable_run
from train.config import load_run
from train.drawing import memory
from train.drawing.settings import Settings
from train.stages import evaluate, generate
from train.verbs import draw as verb
from train.verbs import play
from train.weights import checkpoint, export


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """A finished run, one that is still training, and one that holds only part of what is needed."""
    root = tmp_path_factory.mktemp("runs")
    found = {"finished": drawable_run.make(str(root / "mine")), "live": drawable_run.make(str(root / "live"), live=True)}
    shutil.copytree(root / "live", root / "bare")
    shutil.rmtree(root / "bare" / "dalle")
    shutil.rmtree(root / "bare" / "clip")
    cfg = load_run(found["finished"].url, [])
    torch.manual_seed(3)
    clip = Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)
    export.write(str(root / "foreign"), clip.state_dict(), cfg.clip, parents={"tokenizer": "another"})
    export.write(str(root / "odd"), clip.state_dict(), {"layers": 1, "colour": "red"}, parents={})
    return found | {"bare": RunFolder(str(root / "bare"))}


@pytest.fixture(scope="module")
def line(runs: dict[str, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("first")
    verb.main(runs["finished"].url, ["a red fox"], verb.Options(Settings(n=1), out=str(out)), StopFlag())
    (table,) = out.glob("*/samples.jsonl")
    found: dict[str, Any] = json.loads(table.read_text())
    return found


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails whoever reads weights, on a machine with a megabyte."""
    monkeypatch.setattr(memory, "available", lambda device: 1 << 20)
    for module in (export, checkpoint):
        monkeypatch.setattr(module, "read_tensors", lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    ("which", "settings", "options", "error", "message"),
    [
        ("finished", {"guidance": 3.0}, {}, ConfigError, "guidance = 3.0: this model was trained with dalle_fit.caption_dropout = 0"),
        ("finished", {"temperature": 0.0}, {}, ConfigError, "temperature = 0.0: must be above 0"),
        ("finished", {"top_k": 10**5}, {}, ConfigError, "top_k = 100000: accepted are 1 to dvae.vocab"),
        ("finished", {"n": 1 << 17}, {}, ConfigError, "n = 131072"),
        ("finished", {"window": 99}, {}, ConfigError, "window = 99: accepted are 0"),
        ("finished", {"batch": 1 << 16, "n": 1 << 16}, {}, ConfigError, "65,536 pictures at once take"),
        ("finished", {"search": True, "n": 1 << 16}, {"rerank": "clip"}, ConfigError, "65,536 pictures at once take"),
        ("finished", {"search": True}, {}, ConfigError, "search with n = 4 and rerank none: it needs --rerank clip"),
        ("finished", {"search": True, "n": 1}, {"rerank": "clip"}, ConfigError, "search with n = 1 and rerank clip"),
        ("finished", {"keep_rows": 2}, {}, UsageError, "--keep-rows needs an image"),
        ("finished", {"keep_rows": 4}, {"image": "{}/given.png"}, ConfigError, "keep_rows = 4: accepted are 1 to 3"),
        ("finished", {"fit": "stretch"}, {"image": "{}/given.png"}, ConfigError, "fit 'stretch': accepted are crop"),
        ("finished", {}, {"image": "{}/missing.png"}, DataError, "missing.png"),
        ("finished", {}, {"image": "{}/page.png"}, DataError, "page.png: image cannot be decoded"),
        ("finished", {}, {"rerank": "{}/nowhere"}, ConfigError, "nowhere': accepted are none, clip, and a folder"),
        ("finished", {}, {"rerank": "{root}/foreign"}, DataError, "clip was trained with tokenizer another"),
        ("finished", {}, {"rerank": "{root}/odd"}, ConfigError, "odd': no contrastive model"),
        ("bare", {}, {"rerank": "clip"}, DataError, "there is no clip here"),
        ("bare", {}, {}, DataError, "the transformer has no weights yet"),
        ("finished", {}, {"format": "bmp"}, UsageError, "--format bmp: accepted are png, webp"),
        ("finished", {}, {"out": "{}/page.png/out"}, ConfigError, "page.png"),
        ("finished", {}, {"file": "{}/nobody.txt"}, DataError, "nobody.txt"),
        ("finished", {}, {"device": "tpu"}, ConfigError, "device 'tpu': accepted are cpu and cuda"),
        ("live", {}, {"precision": "fp8"}, ConfigError, "precision 'fp8': accepted are auto"),
        ("live", {}, {"precision": "bf16", "deterministic": True}, ConfigError, "--deterministic with device"),
    ],
)
def test_no_weights_are_read_for_an_option_that_is_wrong(
    which: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    error: type[ReportedError],
    message: str,
    runs: dict[str, RunFolder],
    tmp_path: Path,
    sealed: None,
) -> None:
    drawable_run.picture_file(tmp_path / "given.png")
    (tmp_path / "page.png").write_text("<html>")
    root = str(Path(runs["finished"].url).parent)
    options = {"out": str(tmp_path / "out"), "device": "cpu"} | {
        name: value.replace("{root}", root).replace("{}", str(tmp_path)) if isinstance(value, str) else value for name, value in options.items()
    }
    with pytest.raises(error, match=message):
        verb.main(runs[which].url, ["a red fox"], verb.Options(Settings(**settings), **options), StopFlag())
    assert not (tmp_path / "out").exists(), "nor is a folder made"


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({"candidate": 1}, {}, DataError, "candidate = 1: accepted are 0 to 0"),
        ({"shaped_by": {"ancestry": [[5, 1]]}}, {}, DataError, "ancestry .*: expected rising positions"),
        ({"shaped_by": {"place": 7}}, {}, DataError, "shaped_by.place = 7"),
        ({"shaped_by": {"captions": 60_000}}, {}, ConfigError, "60,000 pictures at once take"),
        ({"shaped_by": {"precision": "fp99"}}, {}, ConfigError, "precision 'fp99'"),
        ({"settings": {"guidance": 2.0}}, {}, DataError, "settings of the line: guidance = 2.0"),
        ({"weights": {"dalle": "f" * 64}}, {}, DataError, "its dalle is .*, and the picture was drawn with ffffffffffff"),
        ({"source": "/nowhere/at/all"}, {}, ConfigError, "neither a run folder nor a package"),
        ({}, {"precision": "bf16"}, ConfigError, "--precision bf16: the picture was drawn in fp32"),
        ({}, {"out": "{}/file/out"}, ConfigError, "file"),
        ({}, {"image": "photo.png"}, UsageError, "--again draws one recorded picture as its line says; --image is for new ones"),
        ({}, {"rerank": "clip"}, UsageError, "--rerank is for new ones"),
        ({}, {"settings": Settings(seed=1)}, UsageError, "--seed is for new ones"),
    ],
)
def test_no_weights_are_read_for_a_line_that_no_drawing_has(
    change: dict[str, Any],
    options: dict[str, Any],
    error: type[ReportedError],
    message: str,
    line: dict[str, Any],
    tmp_path: Path,
    sealed: None,
) -> None:
    (tmp_path / "file").write_text("")
    changed = {name: value | change.get(name, {}) if isinstance(value, dict) else change.get(name, value) for name, value in line.items()}
    given = {"out": str(tmp_path / "again")} | options
    given["out"] = given["out"].replace("{}", str(tmp_path))
    with pytest.raises(error, match=message):
        verb.main("", [], verb.Options(again=json.dumps(changed), **given), StopFlag())
    assert not (tmp_path / "again").exists()


def test_play_binds_its_address_before_it_reads_weights(runs: dict[str, RunFolder], sealed: None) -> None:
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 --port 1: this address cannot be served"):
        play.main(runs["finished"].url, "192.0.2.1", 1, "none", "cpu", "fp32", StopFlag())
    with pytest.raises(ConfigError, match="rerank 'nowhere': accepted"):
        play.main(runs["finished"].url, "127.0.0.1", 0, "nowhere", "cpu", "fp32", StopFlag())
    assert storage.exists(runs["finished"].config_url)


def test_stages_refuse_before_they_look_at_what_earlier_ones_left(runs: dict[str, RunFolder]) -> None:
    url, world = runs["finished"].url, World.single()
    for stage, overrides, message in (
        (generate, ["generate.search=true", "generate.candidates=1", "generate.show=1"], "search with n = 1 and rerank clip"),
        (generate, ["generate.temperature=1e-9"], "temperature = 1e-09: must be above 0"),
        (evaluate, ["evaluate.drawings=4", "generate.temperature=1e9"], "temperature = 1000000000.0: must be above 0"),
        (evaluate, ["evaluate.drawings=4", "evaluate.judge=nowhere"], "evaluate.judge '.*nowhere': accepted are"),
    ):
        with pytest.raises(ConfigError, match=message):
            stage.run(load_run(url, overrides), RunFolder(url), world, StopFlag())
