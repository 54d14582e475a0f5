"""A run's attention engine: chosen once for a kind of device and a dtype, and kept whatever is measured later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.world import World
from model.attention_engines import EngineName
from train.config import load_run
from train.run import attention_engine

CPU = torch.device("cpu")


def chosen(folder: Path, *words: str, dtype: torch.dtype = torch.float32) -> EngineName:
    return attention_engine.of_run(load_run("demo", list(words)), RunFolder(str(folder)), World.single(), CPU, dtype)


def test_a_run_writes_down_its_engine_and_keeps_it_whatever_is_measured_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(tmp_path) == "structured"
    assert json.loads((tmp_path / "attention/cpu-fp32.json").read_text()) == {"engine": "structured"}
    monkeypatch.setattr(attention_engine, "choose", lambda *_: "dense")  # as other records would
    assert chosen(tmp_path) == "structured" and chosen(tmp_path, dtype=torch.bfloat16) == "dense" and chosen(tmp_path / "another run") == "dense"
    assert sorted(path.name for path in (tmp_path / "attention").iterdir()) == ["cpu-bf16.json", "cpu-fp32.json"]


def test_an_engine_that_is_named_is_not_written_down(tmp_path: Path) -> None:
    assert chosen(tmp_path, "dalle.attention=dense") == "dense" and not list(tmp_path.iterdir())


def test_a_kept_engine_that_cannot_run_here_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "attention").mkdir()
    (tmp_path / "attention/cpu-fp32.json").write_text(json.dumps({"engine": "flex"}))
    with pytest.raises(ConfigError, match=r"attention/cpu-fp32\.json: this run has attention = 'flex' .*no backward pass.*or delete the file"):
        chosen(tmp_path)
