"""Configuration keys that come later: what a stored configuration means that lacks them, and which keys a run may change."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from pydantic import ConfigDict, Field

from infra.config import Section, to_json
from infra.config_keys import ANY_TIME, GOING_ON, adopted, completed, declared, keys
from train.config import RunConfig
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


@pytest.mark.parametrize("key", ["zero.stage", "dalle_fit.save_every", "data.workers", "clip_fit.accumulation"])
def test_what_says_how_may_change_at_any_time(key: str) -> None:
    assert declared(RunConfig, key)["may_change"] == "any time"


def test_nothing_but_training_may_change_with_go_on() -> None:
    """A change point is a property of a training stage's updates."""
    for section in keys(RunConfig):
        for key in keys(section.annotation):
            if declared(RunConfig, f"{section.name}.{key.name}").get("may_change") == "with --go-on":
                assert section.name in ("dvae_fit", "dalle_fit", "clip_fit"), f"{section.name}.{key.name}"


def test_the_reference_and_the_schema_show_which_keys_may_change() -> None:
    made = docs.generated()
    schema = json.loads(made["config.schema.json"])["$defs"]
    assert schema["DalleFit"]["properties"]["lr"]["may_change"] == "with --go-on" and schema["ZeroSection"]["may_change"] == "any time"
    rows = [line for line in made["configuration.md"].splitlines() if line.startswith(("| `lr` ", "| `stage` ", "| `layers` "))]
    assert {row.split("|")[4].strip() for row in rows if "`lr`" in row} == {"with --go-on"}
    assert [row.split("|")[4].strip() for row in rows if "`stage`" in row] == ["any time"]
    assert {row.split("|")[4].strip() for row in rows if "`layers`" in row} == {""}
