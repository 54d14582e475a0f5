"""Configuration keys that come later: what a stored configuration means that lacks them, and which keys a run may change."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ConfigDict, Field

from data_pipeline.config import SourceConfig
from infra.config import Section, to_json
from infra.config_keys import ANY_TIME, GOING_ON, PLACE, adopted, completed, declared, keys
from infra.errors import ConfigError
from infra.repository import DOCS
from train.config import RunConfig, load_run
from train.run.stage_table import TRAINED
from train.verbs import docs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    width: int = 8
    bias: bool = dataclasses.field(default=True, metadata={"before": False})


class Item(Section):
    url: str
    strict: bool = Field(default=True, json_schema_extra={"before": False})


class Part(Section):
    model_config = ConfigDict(json_schema_extra=ANY_TIME)
    size: int = 1
    sizes: tuple[int, ...] = Field(default=(2,), json_schema_extra={"before": []})


class Whole(Section):
    part: Part = Part()
    shape: Shape = Shape()
    items: tuple[Item, ...] = (Item(url="a"),)
    rate: float = Field(default=0.5, json_schema_extra=GOING_ON)
    place: str = Field(default="here", exclude=True)


def old() -> dict[str, Any]:
    """What was stored before bias, strict, sizes and rate existed, when the place was still kept."""
    return {"part": {"size": 1}, "shape": {"width": 8}, "items": [{"url": "a"}], "place": "there"}


def test_a_key_that_a_stored_configuration_lacks_means_the_behaviour_before_it_existed() -> None:
    found = completed(Whole, old())
    assert found == {"part": {"size": 1, "sizes": []}, "shape": {"width": 8, "bias": False}, "items": [{"url": "a", "strict": False}], "rate": 0.5}
    assert completed(Whole, found) == found, "and what it has stays"
    assert completed(Whole, {})["part"] == {"size": 1, "sizes": []}, "whole sections may be younger too"
    assert completed(Whole, {})["items"] == [{"url": "a", "strict": True}], "a default list is made now"


def test_a_run_goes_on_with_the_old_behaviour_unless_somebody_asks_for_the_new_one() -> None:
    plain = adopted(Whole(), old())
    assert (plain.part.sizes, plain.shape.bias, plain.items[0].strict, plain.rate) == ((), False, False, 0.5)
    given = Whole.model_validate_json(json.dumps({"items": [{"url": "a"}], "part": {"sizes": [2]}}))
    asked = adopted(given, old())
    assert asked.part.sizes == (2,) and not asked.items[0].strict
    assert json.loads(to_json(adopted(Whole(items=(Item(url="a"),)), old()))) == completed(Whole, old())
    now = json.loads(to_json(Whole()))
    assert adopted(Whole(), now) == Whole(), "where nothing is missing, nothing changes"


def test_each_key_says_whether_a_run_may_change_it_alone_or_with_its_section() -> None:
    found = {path: declared(Whole, path).get("may_change") for path in ("part.size", "rate", "shape.width", "items", "nothing.there")}
    assert found == {"part.size": "any time", "rate": "with --go-on", "shape.width": None, "items": None, "nothing.there": None}


_KEYS_OF_DRAWINGS = re.findall(r"(evaluate\.\w+)", (DOCS / "evaluation.md").read_text())


@pytest.mark.parametrize("key", ["zero.stage", "dalle_fit.save_every", "data.workers", "clip_fit.accumulation", *sorted(set(_KEYS_OF_DRAWINGS))])
def test_what_says_how_may_change_at_any_time(key: str) -> None:
    assert declared(RunConfig, key)["may_change"] == "any time"


def test_nothing_but_training_may_change_with_go_on() -> None:
    """A change point is a property of a training stage's updates."""
    for section in keys(RunConfig):
        for key in keys(section.annotation):
            if declared(RunConfig, f"{section.name}.{key.name}").get("may_change") == "with --go-on":
                assert section.name in {f"{stage}_fit" for stage in TRAINED}, f"{section.name}.{key.name}"


def test_the_reference_and_the_schema_show_which_keys_may_change() -> None:
    made = docs.generated()
    schema = json.loads(made["config.schema.json"])["$defs"]
    assert schema["DalleFit"]["properties"]["lr"]["may_change"] == "with --go-on" and schema["ZeroSection"]["may_change"] == "any time"
    rows = [line for line in made["configuration.md"].splitlines() if line.startswith(("| `lr` ", "| `stage` ", "| `layers` "))]
    assert {row.split("|")[4].strip() for row in rows if "`lr`" in row} == {"with --go-on"}
    assert [row.split("|")[4].strip() for row in rows if "`stage`" in row] == ["any time"]
    assert {row.split("|")[4].strip() for row in rows if "`layers`" in row} == {""}


def test_relative_places_are_meant_from_the_working_directory_and_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ["data.images=shared/", "data.takedown=../list", 'data.sources=["photos/*.png", "emoji", "s3://b/x", "/data"]', "filters.blocked_words=w"]
    words += ['evaluate.lpips_weights=["./a.pth"]', "dalle_fit.init_from=export", "run.root=runs"]
    cfg = load_run("tiny", words)
    here = f"{tmp_path}/here"
    assert (cfg.data.images, cfg.data.takedown, cfg.filters.blocked_words) == (f"{here}/shared/", f"{here}/../list", f"{here}/w")
    assert [source.url for source in cfg.data.sources] == [f"{here}/photos/*.png", "emoji", "s3://b/x", "/data"]
    assert (cfg.evaluate.lpips_weights, cfg.dalle_fit.init_from, cfg.run.root, cfg.data.codes) == ((f"{here}/a.pth",), f"{here}/export", "runs", "")
    (tmp_path / "config.json").write_text(to_json(cfg))
    monkeypatch.chdir("/")
    assert load_run(f"{tmp_path}/config.json", []).data == cfg.data
    older = (tmp_path / "config.json").read_text().replace(f"{here}/shared/", "shared")
    (tmp_path / "config.json").write_text(older)
    again = load_run(f"{tmp_path}/config.json", ["data.codes=codes"])
    assert (again.data.images, again.data.codes, again.data.sources) == ("shared", "/codes", cfg.data.sources), "what a run has stays as it is"


def test_a_relative_place_needs_a_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    with pytest.raises(ConfigError, match="shared: a relative path, but the working directory does not exist any more"):
        load_run("tiny", ["data.images=shared"])
    assert load_run("tiny", ["data.images=/shared"]).data.images == "/shared"


def test_every_key_that_names_files_is_known_as_a_place() -> None:
    """Keys whose description speaks of a URL, a file or a folder; those that do and are no place of the site stand here with their reason."""
    others = {"overlay", "root", "name", "source", "url"}  # a name or a folder, found beside the code too; where the run lies, which is not stored
    seen = set()

    def walk(model: Any) -> None:
        for name, info in getattr(model, "model_fields", {}).items():
            inner = info.annotation
            if hasattr(inner, "model_fields"):
                walk(inner)
            said = (info.description or "").split(".")[0].split(";")[0].lower()
            text = "str" in str(inner) and "Literal" not in str(inner)
            if text and any(word in said.split() for word in ("url", "file", "files", "folder", "weights")) and name not in others:
                assert (info.json_schema_extra or {}).get("place"), f"{model.__name__}.{name}: {said}"
                seen.add(name)

    walk(RunConfig)
    assert {"images", "tokenizer", "codes", "takedown", "blocked_words", "init_from", "attention_records", "lpips_weights", "frechet_weights"} <= seen
    assert SourceConfig.model_fields["url"].json_schema_extra == PLACE == SourceConfig.model_fields["roots"].json_schema_extra
