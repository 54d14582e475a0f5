"""Whether drawings find their captions: the count, and a run before and after stage align. About 15 s."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infra.errors import ConfigError, UsageError
from tests.support.stopped_run import FIXTURE, run_stage
from train.drawing.settings import Settings
from train.experiments import retrieval

COLOURS = {"red": 0, "green": 1, "blue": 2}


class Sees:
    """A judge that compares mean colours."""

    networks: frozenset[str] = frozenset()

    def encode_image(self, pixels_B3YX: torch.Tensor) -> torch.Tensor:
        return pixels_B3YX.mean((2, 3))

    def encode_caption(self, caption: str) -> torch.Tensor:
        return torch.eye(3)[COLOURS[caption]][None]


def test_a_hit_is_a_drawing_whose_own_caption_is_among_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    painted = {"red": ["red", "red"], "green": ["green", "blue"], "blue": ["red", "red"]}

    def drawn(models: Any, captions: list[str], settings: Settings) -> Any:
        for caption in captions:
            for colour in painted[caption]:
                pixels_YXC = np.full((4, 4, 3), 10, dtype=np.uint8)
                pixels_YXC[..., COLOURS[colour]] = 200
                pixels_YXC[..., (COLOURS[colour] + 1) % 3] = 50
                yield [SimpleNamespace(caption=caption, pixels_YXC=pixels_YXC)]

    monkeypatch.setattr(retrieval, "draw", drawn)
    models: Any = None
    found = retrieval.hits(models, Sees(), list(COLOURS), Settings(n=2))
    assert found[:, 0].tolist() == [1.0, 0.5, 0.0] and (found[:, 1:] == 1).all(), "of three captions, all are among the first five"


def test_a_run_is_compared_with_what_it_was_before_it_was_aligned(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = str(shutil.copytree(FIXTURE / "run", tmp_path / "mine"))
    for stage in ("dalle", "align", "clip"):
        run_stage(stage, [run, *(["align_fit.steps=2", "align_fit.lr=1e-2"] if stage == "align" else [])])
    out = tmp_path / "figures.json"
    retrieval.main([f"{run}/dalle/export", run, "--guidance", "1", "--n", "3", "--out", str(out)])
    found = json.loads(out.read_text())
    before, after = found["rows"]
    assert before["weights"] != after["weights"] and found["captions"] == 3 and found["drawings_of_each"] == 3
    assert before["recall_at_5"] == 1.0 == after["recall_at_5"] and before["recall_at_1_less_first"] == [0.0, 0.0]
    less, error = after["recall_at_1_less_first"]
    assert less == pytest.approx(after["recall_at_1"] - before["recall_at_1"]) and error >= 0
    assert f"{run}/dalle/export  guidance 1  R@1 " in capfd.readouterr().out
    with pytest.raises(ConfigError, match="give one run folder, and exports in it"):
        retrieval.main([run, str(shutil.copytree(run, tmp_path / "other"))])
    with pytest.raises(UsageError, match=r"^--guidance 1;2: accepted are numbers with commas between them"):
        retrieval.main([run, "--guidance", "1;2"])
    with pytest.raises(ConfigError, match="guidance = 2"):
        retrieval.main([run, "--guidance", "2"])
