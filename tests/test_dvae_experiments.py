"""The experiments on stage 1: what is run, what is reported, and the committed page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import ExitCode
from train import experiments
from train.config import load_run
from train.front import run_folder


def fake_runs(root: Path, codes: dict[str, int]) -> tuple[list[tuple[str, str]], Any]:
    """A launcher that trains nothing: (stage, run name) of each call, and markers where a training succeeds."""
    calls: list[tuple[str, str]] = []

    def launch(stage: str, preset: str, words: list[str], nproc: int) -> int:
        cfg = load_run(preset, list(words))
        calls.append((stage, cfg.run.name))
        code = codes.get(cfg.run.name, 0) if stage == "dvae" else 0
        if stage == "dvae" and code == 0:
            figures = {"psnr": 20 + cfg.dvae_fit.beta, "code_use": 0.5, "extra": 1.0}
            storage.write_json(run_folder(cfg).at("dvae", "done.json"), {"summary": figures})
        assert cfg.data.images == f"{root}/tiny-images"
        return code

    return calls, launch


def test_each_variant_differs_from_the_first_in_its_one_thing_and_shares_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, launch = fake_runs(tmp_path, {"tiny-linear-temperature": int(ExitCode.DIVERGED)})
    monkeypatch.setattr(experiments, "_launch", launch)
    found = experiments.run("tiny", [f"run.root={tmp_path}", "dvae_fit.steps=7"], 1)
    assert found["settings"]["overrides"] == ["dvae_fit.steps=7"] and found["settings"]["steps"] == 7
    names = [f"tiny-{slug}" for slug in ("as-the-paper", "beta-0", "beta-1", "linear-temperature", "average-pooling")]
    assert calls == [(stage, name) for name in names for stage in ("prepare", "dvae")]
    assert {title: row["figures"].get("psnr") for title, row in found["rows"].items()} == {
        "as the paper": 26.6,
        "beta 0": 20.0,
        "beta 1": 21.0,
        "linear temperature": None,
        "average pooling": 26.6,
    }
    assert found["rows"]["linear temperature"]["end"] == "diverged" and "extra" not in found["rows"]["beta 0"]["figures"]
    page = experiments.table(found)
    assert "| beta 0 | 20 | – | – | – | 0.5 | – | – | done |" in page and "| linear temperature | – " in page


def test_an_error_that_is_no_divergence_ends_the_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as caught:
        experiments._launch("dvae", "tiny", [], 1)
    assert caught.value.code == 1


def test_figures_and_page_are_written_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"beta 0": {"changes": [], "end": "done", "minutes": 1.0, "figures": {"psnr": 12.5}}}
    result = {"name": "x", "settings": {"steps": 20, "overrides": ["a.b=1"]}, "rows": rows, "producer": {"commit": "0123456789ab"}}
    monkeypatch.setattr(experiments, "run", lambda *arguments: result)
    experiments.main(["tiny", "--out", str(tmp_path / "experiments")])
    assert "| beta 0 | 12.5 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "experiments" / "x.json").read_text()) == result
    monkeypatch.setattr(experiments, "DOCS", tmp_path)
    experiments.main(["--render"])
    page = (tmp_path / "experiments.md").read_text()
    assert "## x with `a.b=1`" in page and "Far too short" in page and "## What is missing" in page
    long = json.dumps(result | {"settings": {"steps": 5000, "overrides": []}})
    (tmp_path / "experiments" / "x.json").write_text(long)
    assert "missing" not in experiments.render(tmp_path / "experiments") and "Far too short" not in experiments.render(tmp_path / "experiments")


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    page = (experiments.DOCS / "experiments.md").read_text()
    assert page == experiments.render(experiments.DOCS / "experiments"), "run: python -m train.experiments --render"
