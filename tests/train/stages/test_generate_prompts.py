"""Which captions are drawn: the same as by sorting all records, without reading their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.shard_set import ShardSet
from infra.seeds import derive
from tests.support.made_sets import image, make_images
from train.config import RunConfig
from train.stages import generate_prompts
from train.stages.generate_prompts import prompts, ranges

CFG = RunConfig.model_validate({"generate": {"num_captions": 4, "num_known_captions": 3}})


def _sets(root: Path) -> tuple[ShardSet, ShardSet]:
    """Training groups of 1 to 4 records, of which some are hidden, in three parts; validation groups of two."""
    numbers = np.random.default_rng(5).permutation([group for group in range(12) for _ in range(1 + group % 4)])
    records = [image(number, group=f"group-{group}") for number, group in enumerate(numbers)]
    training = make_images(str(root / "train"), [records[:7], [], records[7:]], excluded=[0, 9, 11])
    held = [image(100 + number, "validation", group=f"held-{number // 2}") for number in range(14)]
    return training, make_images(str(root / "validation"), [held[:5], held[5:]], split="validation", excluded=[2])


def _by_sorting(training: ShardSet, validation: ShardSet, cfg: RunConfig) -> list[str]:
    """The rule, with all records in memory."""

    def one_each(images: ShardSet) -> Iterator[dict[str, Any]]:
        seen = set()
        for record in images.records():
            if record["group"] not in seen:
                seen.add(record["group"])
                yield record

    held = sorted(one_each(validation), key=lambda record: derive(cfg.run.seed, "sample", record["group"]))
    frequency = Counter(record["group"] for record in training.records())
    known = sorted(one_each(training), key=lambda record: (-frequency[record["group"]], record["group"]))
    return [record["id"] for record in held[: cfg.generate.num_captions] + known[: cfg.generate.num_known_captions]]


def test_prompts_are_those_of_sorting_all_records_and_whole_parts_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, validation = _sets(tmp_path)
    expected = _by_sorting(training, validation, CFG)

    def refusing(*_: Any) -> Iterator[dict[str, Any]]:
        raise AssertionError("a part was read with its images")

    monkeypatch.setattr("data_pipeline.shards.shard_set.read_records", refusing)
    found = prompts(CFG, training, validation)
    assert [prompt.id for prompt in found] == expected
    assert [prompt.split for prompt in found] == ["validation"] * 4 + ["train"] * 3 and all(prompt.truth for prompt in found)


def test_groups_counted_range_by_range_are_those_counted_at_once(tmp_path: Path) -> None:
    training, _ = _sets(tmp_path)
    whole, pieces = list(ranges(training)), list(ranges(training, most=4))
    assert len(whole) == 1 and len(pieces) == 7
    for field in ("hash_G", "first_G", "count_G"):
        assert np.concatenate([getattr(piece, field) for piece in pieces]).tolist() == getattr(whole[0], field).tolist()
    visible = [record["group"] for record in training.records()]
    assert whole[0].count_G.sum() == len(visible) == training.count and len(whole[0].hash_G) == len(set(visible))


def test_of_more_groups_than_names_are_read_of_the_smallest_hashes_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, validation = _sets(tmp_path)
    monkeypatch.setattr(generate_prompts, "_NAMED", 1)
    monkeypatch.setattr(generate_prompts, "_RANGE", 4)
    few = RunConfig.model_validate({"generate": {"num_captions": 2, "num_known_captions": 2}})
    groups = next(ranges(validation, 1 << 20))
    held = {record["group"] for record in validation.rows_at(groups.first_G[:2])}
    found = prompts(few, training, validation)
    assert {record["group"] for record in validation.records() if record["id"] in {prompt.id for prompt in found[:2]}} == held
    sizes = Counter(record["group"] for record in training.records())
    drawn = [record["group"] for prompt in found[2:] for record in training.records() if record["id"] == prompt.id]
    assert sorted(sizes[group] for group in drawn) == sorted(sizes.values())[-2:]


def test_captions_of_the_configuration_are_drawn_as_they_are(tmp_path: Path) -> None:
    training, validation = _sets(tmp_path)
    given = RunConfig.model_validate({"generate": {"captions": ("a red fox", "zwei Füchse")}})
    assert [(prompt.caption, prompt.id) for prompt in prompts(given, training, validation)] == [("a red fox", None), ("zwei Füchse", None)]
