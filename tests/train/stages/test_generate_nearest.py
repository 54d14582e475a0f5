"""The nearest training images of many pictures, in one pass over the set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.shard_set import ShardSet
from tests.support.made_sets import image, make_images
from train.stages import generate_nearest
from train.stages.generate_nearest import nearest, thumbs, view

SIDE = 16


def _set(root: Path) -> ShardSet:
    records = [image(number) for number in range(11)]
    return make_images(str(root), [records[:4], [], records[4:]], excluded=[1, 6])


def _by_comparing_all(pictures: np.ndarray, training: ShardSet, among: int) -> list[tuple[str, float]]:
    records = list(training.records())[:among]
    theirs = thumbs(np.stack([view(record["image"], SIDE) for record in records])).astype(np.float64)
    found = []
    for ours in thumbs(pictures).astype(np.float64):
        distances = np.sqrt(((theirs - ours) ** 2).mean(1))
        found.append((records[int(distances.argmin())]["id"], float(distances.min())))
    return found


@pytest.mark.parametrize("among", [3, 100])
def test_each_picture_gets_the_image_that_comparing_all_of_them_finds(tmp_path: Path, among: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = _set(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), dtype=np.uint8)
    stored = np.stack([view(record["image"], SIDE) for record in training.records()])[[8, 2, 2]]
    pictures = np.concatenate([noise, stored])
    monkeypatch.setattr(generate_nearest, "_BLOCK", 2)
    found = nearest(thumbs(pictures), training, SIDE, among)
    assert found is not None
    expected = _by_comparing_all(pictures, training, among)
    assert [one.id for one in found] == [identity for identity, _ in expected]
    assert np.allclose([one.distance for one in found], [distance for _, distance in expected], atol=2e-4)
    images = {record["id"]: record["image"] for record in training.records()}
    assert all(one.image == images[one.id] for one in found)


def test_training_images_are_decoded_once_however_many_pictures_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, decoded = _set(tmp_path), []
    whole = generate_nearest.view

    def counting(data: bytes, size: int) -> Any:
        decoded.append(data)
        return whole(data, size)

    monkeypatch.setattr(generate_nearest, "view", counting)
    nearest(np.zeros((50, 3 * SIDE**2), np.float32), training, SIDE, 100)
    assert len(decoded) == training.count + 1 == 10, "each once, and the one that all fifty have as their nearest"


def test_a_stop_between_two_blocks_ends_the_search_without_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_nearest, "_BLOCK", 4)
    asked: list[int] = []

    def until_the_second(done: int) -> bool:
        asked.append(done)
        return len(asked) < 2

    assert nearest(np.zeros((1, 3 * SIDE**2), np.float32), _set(tmp_path), SIDE, 100, until_the_second) is None
    assert asked == [0, 4]
