"""Configuration: strict presets and overrides, messages that name keys, generated documents that are not stale, no knob that does nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from infra.config import differences, to_json
from infra.errors import ConfigError
from infra.job import ClusterConfig
from tests.support.root import ROOT
from train.config import PRESETS, RunConfig, load_run
from train.verbs import docs

NAMES = sorted(path.stem for path in PRESETS.glob("*.toml"))


@pytest.mark.parametrize("preset", NAMES)
def test_every_preset_loads_and_says_what_it_is_for(preset: str) -> None:
    assert load_run(preset, []).run.name == preset
    head = (PRESETS / f"{preset}.toml").read_text().split("\n[")[0]
    assert re.search(r"^# .*launcher\.py", head, re.M), "the header should name a command"


@pytest.mark.parametrize("preset", NAMES)
def test_a_preset_states_only_what_differs_from_the_defaults(preset: str) -> None:
    from infra.config import flatten
    from train.config import read_preset

    # [cluster], run.name and run.root are no part of config.json.
    defaults = flatten(json.loads(to_json(RunConfig())) | {"cluster": json.loads(to_json(ClusterConfig()))}) | {"run.name": "run", "run.root": "runs"}
    same = [key for key, value in flatten(read_preset(preset)[0]).items() if defaults[key] == value]
    assert not same, f"{preset}.toml repeats defaults: {', '.join(same)}"


def test_a_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    cfg = load_run("tiny", ["dalle.layers=6", 'generate.captions=["a red apple"]'])
    (tmp_path / "config.json").write_text(to_json(cfg))
    nameless = cfg.model_copy(update={"run": RunConfig().run})  # name and root are where a run lies, and not stored
    assert load_run(str(tmp_path), []) == nameless == load_run(str(tmp_path / "config.json"), [])


def test_the_defaults_are_the_papers() -> None:
    cfg = RunConfig()
    assert (cfg.dalle.layers, cfg.dalle.width, cfg.dalle.heads) == (64, 3968, 62)
    assert cfg.stream_shape().states == 1280 and cfg.dvae.vocab == 8192 and cfg.tokenizer.vocab == 16384
    assert (cfg.dvae_fit.beta, cfg.dvae_fit.tau_final, cfg.dvae_fit.lr, cfg.dalle_fit.lr, cfg.dalle_fit.beta2) == (6.6, 1 / 16, 1e-4, 4.5e-4, 0.96)


REFUSED = [
    ("dalle.layer=6", r"dalle\.layer: unknown key; accepted in \[dalle\]: .*layers"),
    ("foo.x=1", r"foo: unknown key; accepted as sections: align_fit, clip, "),
    ("dalle.layers=six", r"dalle\.layers: .*integer.*given: 'six'"),
    ("dalle.layers=6.0", r"dalle\.layers: .*integer"),
    ('dvae_fit.lr="a"', r"dvae_fit\.lr: .*number.*given: \"a\" \(read as 'a'\)"),
    ("run.name=a/b", r"run\.name: .*pattern"),
    ("run.seed=-1", r"run\.seed: .*greater than or equal to 0"),
    ("run.seed=1979-05-27", r"run\.seed: 1979-05-27 is read as a date or a time, which no key accepts; write 'run\.seed=\"1979-05-27\"' for text"),
    ("data.sources=[]", r"sources is empty"),
    ('data.sources=["emoji", "emoji"]', r"sources names 'emoji' twice; raise its weight instead"),
    ("dvae.image_size=18", r"image_size = 18 is not divisible by downsample = 4; nearest sizes: 16, 20"),
    ("dvae.downsample=3", r"downsample = 3: accepted are 2, 4, 8 and 16"),
    ("dvae.groups=1", r"groups = 1 cannot downsample by 4"),
    ("dvae.width=6", r"width = 6: must be a multiple of 4"),
    ("dvae.vocab=0", r"vocab = 0: must be positive"),
    ("dvae.vocab=70000", r"code shards hold uint16"),
    ("dalle.width=33", r"width = 33 does not divide into heads = 2; nearest widths: 32, 34"),
    ("dalle.conv_kernel=4", r"conv_kernel = 4: must be odd"),
    ("dalle.text_loss_weight=2.0", r"text_loss_weight = 2.0: must lie in \[0, 1\]"),
    ("dalle.embedding_scale=0.0", "embedding_scale = 0.0: must be positive"),
    ("dalle.base_width=-1", "base_width = -1, base_heads = 0: must be positive, or 0 for none"),
    ("dalle.base_heads=2", "base_heads = 2 without base_width: set base_width to the width of the model with these heads"),
    ("dalle.base_width=24", "base_width = 24 does not divide into heads of width / heads = 16; set base_heads to the heads of that model"),
    ("clip.heads=3", r"width = 32 does not divide into heads = 3"),
    ("clip.patch=5", r"clip\.patch = 5 does not divide dvae\.image_size = 16"),
    ("dvae_fit.scale_min=2.0", r"scale_min = 2.0 is above"),
    ("data.render_size=8", r"data\.render_size = 8 is below dvae\.image_size = 16"),
    ("generate.show=9", r"generate\.show = 9 is above"),
    ("generate.guidance=2.0", r"generate\.guidance = 2.0 needs a model trained with dalle_fit\.caption_dropout above 0"),
    ("generate.top_k=33", r"generate\.top_k = 33 is above dvae\.vocab = 32"),
    ("generate.window=5", r"generate\.window = 5 is above the grid of 4 codes"),
    ("dalle.layers", r"override 'dalle\.layers': expected section\.key=value"),
    ("dalle.layers.x=1", r"'layers' is a value, not a section"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_a_wrong_value_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run("tiny", [override])


def test_an_unknown_or_broken_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preset 'tinny': no such preset.*tiny"):
        load_run("tinny", [])
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_run(str(bad), [])
    listed = tmp_path / "list.json"
    listed.write_text("[]")
    with pytest.raises(ConfigError, match="expected sections"):
        load_run(str(listed), [])


def test_differences_name_keys_and_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == ["a.c: 2 -> 3", "d: '(absent)' -> 4"]


@pytest.mark.parametrize("name", ["config.schema.json", "configuration.md"])
def test_generated_documents_are_not_stale(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == docs.generated()[name], "run: python launcher.py docs"


def test_every_key_is_described_and_read_somewhere() -> None:
    schema = RunConfig.model_json_schema()
    code = "\n".join(path.read_text() for folder in ("model", "data_pipeline", "train", "infra") for path in (ROOT / folder).rglob("*.py"))
    for section in schema["properties"].values():
        for key, value in schema["$defs"][section["$ref"].rsplit("/", 1)[1]]["properties"].items():
            assert value.get("description"), f"{key} has no description"
            assert re.search(rf"\.{key}\b", code), f"nothing reads .{key}: a knob that does nothing"
