"""The names of parts: a key at its default changes none, and those of the drawings are what they were before sources had further keys."""

from __future__ import annotations

import pytest

from data_pipeline.config import LATER, DataConfig, FilterConfig, SourceConfig
from data_pipeline.prepare import plan as planning
from data_pipeline.prepare.plan import Plan, Unit, named
from data_pipeline.shards.shard_set import part_name
from data_pipeline.sources.drawings import EmojiSource
from data_pipeline.sources.pairs import InputShard


class Drawings(EmojiSource):
    """The drawings, without what depends on installed packages."""

    def version(self) -> str:
        return "emoji/1"


def plan_of(monkeypatch: pytest.MonkeyPatch, source: SourceConfig) -> Plan:
    monkeypatch.setattr(planning, "fingerprint", lambda config: "filters")
    data = DataConfig(sources=(source,))
    unit = Unit(0, InputShard("drawings-0", "v1", ("a", "b"), (0, 2)))
    return Plan(data, FilterConfig(), 32, 0, [Drawings(384)], [unit])


def test_the_parts_of_the_drawings_have_the_names_of_before_further_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(monkeypatch, SourceConfig(url="emoji"))
    assert plan.inputs(plan.units[0]) == "3be298bc77fb7f33c7fe58c96bb1544f744f4d4d3fb6bac01258b7790981a874"
    assert "identity" not in plan.settings() and "validation" not in plan.settings()


def test_a_later_key_at_its_default_changes_no_name_and_one_that_is_set_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SourceConfig(url="emoji")
    plain = plan_of(monkeypatch, before).inputs(plan_of(monkeypatch, before).units[0])
    for key in LATER:
        default = SourceConfig.model_fields[key].default
        same = before.model_copy(update={key: default})
        other = before.model_copy(update={key: "x" if isinstance(default, str) else ("x",)})
        assert plan_of(monkeypatch, same).inputs(plan_of(monkeypatch, same).units[0]) == plain
        assert plan_of(monkeypatch, other).inputs(plan_of(monkeypatch, other).units[0]) != plain


def test_the_place_of_a_source_is_in_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (plan_of(monkeypatch, SourceConfig(url=url)) for url in ("/data/one", "s3://bucket/other"))
    assert one.inputs(one.units[0]) == other.inputs(other.units[0])
    assert one.settings()["identity"].startswith("2: ids below their source")


def test_sources_without_a_name_are_numbered_and_the_drawings_are_not() -> None:
    found = named(tuple(SourceConfig(url=url, name=name) for url, name in (("a", ""), ("emoji", ""), ("b", ""), ("c", "mine"), ("d", ""))))
    assert [entry.name for entry in found] == ["", "", "1", "mine", "2"]
    assert part_name("0123456789abcdef0") == "part-0123456789abcdef"
