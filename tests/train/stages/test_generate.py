"""Stopping and going on in the stage generate: what was drawn is not drawn again, and the search ends each caption."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from infra import storage
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.config import DVAEConfig
from tests.support.made_sets import image, make_images
from train.config import RunConfig
from train.config_pictures import GenerateSection
from train.report.images import png_bytes
from train.stages import generate
from train.stages.generate_prompts import Prompt

CFG = RunConfig(dvae=DVAEConfig(image_size=16), generate=GenerateSection(candidates=2, show=2))


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> generate._Task:
    """Two captions of two pictures each; drawing makes noise and scores 0 and 1."""

    def draw(models: Any, captions: list[str], settings: Any) -> Any:
        noise = np.random.default_rng(len(captions[0])).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
        return [[SimpleNamespace(caption=captions[0], seed=number, pixels_YXC=noise[number]) for number in range(2)]]

    monkeypatch.setattr(generate, "draw", draw)
    monkeypatch.setattr(generate, "score", lambda models, pictures: [0.0, 1.0])
    models: Any = SimpleNamespace(lineage={"dalle": "d", "dvae": "v", "clip": "c", "tokenizer": "t"})
    return generate._Task(CFG, RunFolder(str(tmp_path / "run")), [Prompt("a fox"), Prompt("a blue house")], generate.of_stage(CFG), models)


def test_a_caption_that_was_drawn_before_a_stop_is_not_drawn_again(task: generate._Task, monkeypatch: pytest.MonkeyPatch) -> None:
    generate._draw_one(task, 0)
    assert not task.is_finished(0)
    drawn: list[int] = []
    monkeypatch.setattr(generate, "_draw_one", lambda task, index: drawn.append(index))
    generate._draw(task, [0, 1], World(0, 1, 0, 1), StopFlag())
    assert drawn == [1]


def test_the_search_finishes_every_caption_with_its_own_pictures_nearest_images(task: generate._Task, tmp_path: Path) -> None:
    training = make_images(str(tmp_path / "train"), [[image(number) for number in range(5)]])
    generate._draw(task, [0, 1], World(0, 1, 0, 1), StopFlag())
    generate._search(task, [0, 1], training, World(0, 1, 0, 1), StopFlag())
    for index, caption in enumerate(("a fox", "a blue house")):
        entry = storage.read_json(task.entry_url(index))
        assert entry["caption"] == caption and [picture["score"] for picture in entry["pictures"]] == [1.0, 0.0]
        for picture in entry["pictures"]:
            shown = generate.view(storage.read_bytes(task.run.at(picture["file"])), 16)
            (alone,) = generate.nearest(generate.thumbs(shown[None]), training, 16, 5) or []
            assert picture["nearest"]["id"] == alone.id and picture["nearest"]["distance"] == pytest.approx(alone.distance, abs=1e-6)
            assert storage.read_bytes(task.run.at(picture["nearest"]["file"])) == png_bytes(generate.view(alone.image, 16))


def test_a_search_in_several_passes_writes_what_one_pass_writes(task: generate._Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_images(str(tmp_path / "train"), [[image(number) for number in range(5)]])
    other = dataclasses.replace(task, run=RunFolder(str(tmp_path / "other")))
    for one, searched in ((task, 4), (other, 1)):
        monkeypatch.setattr(generate, "_SEARCHED", searched)
        generate._draw(one, [0, 1], World(0, 1, 0, 1), StopFlag())
        generate._search(one, [0, 1], training, World(0, 1, 0, 1), StopFlag())
    assert [storage.read_json(task.entry_url(index)) for index in (0, 1)] == [storage.read_json(other.entry_url(index)) for index in (0, 1)]


def test_a_stop_before_the_search_leaves_captions_unfinished(task: generate._Task, tmp_path: Path) -> None:
    training = make_images(str(tmp_path / "train"), [[image(number) for number in range(5)]])
    generate._draw(task, [0, 1], World(0, 1, 0, 1), StopFlag())
    stop = StopFlag()
    stop.handle(signal.SIGTERM, None)
    generate._search(task, [0, 1], training, World(0, 1, 0, 1), stop)
    assert not task.is_finished(0) and not task.is_finished(1)
