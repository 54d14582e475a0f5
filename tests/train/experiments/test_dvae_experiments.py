"""The experiments on stage 1: what is run, what is reported, and the committed page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.config import to_json
from infra.errors import DataError, ExitCode
from train.config import load_run
from train.experiments import curves
from train.experiments import page as page_module
from train.loop.metrics import MetricsWriter
from train.run.places import run_folder


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
    monkeypatch.setattr(page_module, "_launch", launch)
    found = page_module.run("tiny", [f"run.root={tmp_path}", "dvae_fit.steps=7"], 1)
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
    page = page_module.table(found)
    assert "| beta 0 | 20 | – | – | – | 0.5 | – | – | done |" in page and "| linear temperature | – " in page


def test_an_error_that_is_no_divergence_ends_the_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module.sys, "executable", "/bin/false")
    with pytest.raises(SystemExit) as caught:
        page_module._launch("dvae", "tiny", [], 1)
    assert caught.value.code == 1


def test_figures_and_page_are_written_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"beta 0": {"changes": [], "end": "done", "minutes": 1.0, "figures": {"psnr": 12.5}}}
    result = {"name": "x", "settings": {"steps": 20, "overrides": ["a.b=1"]}, "rows": rows, "producer": {"commit": "0123456789ab"}}
    monkeypatch.setattr(page_module, "run", lambda *arguments: result)
    page_module.main(["tiny", "--out", str(tmp_path / "experiments")])
    assert "| beta 0 | 12.5 |" in capsys.readouterr().out
    assert json.loads((tmp_path / "experiments" / "x.json").read_text()) == result
    monkeypatch.setattr(page_module, "DOCS", tmp_path)
    page_module.main(["--render"])
    page = (tmp_path / "experiments.md").read_text()
    assert "## x with `a.b=1`" in page and "Far too short" in page and "## What is missing" in page
    long = json.dumps(result | {"settings": {"steps": 5000, "overrides": []}})
    (tmp_path / "experiments" / "x.json").write_text(long)
    assert "missing" not in page_module.render(tmp_path / "experiments") and "Far too short" not in page_module.render(tmp_path / "experiments")


def finished_run(root: Path, evaluations: int) -> str:
    """A run folder with what the stages prepare and dvae leave."""
    cfg = load_run("tiny", [f"run.root={root}", "dvae_fit.steps=40"])
    run = run_folder(cfg)
    storage.write_json(run.config_url, json.loads(to_json(cfg)))
    storage.write_json(run.at("provenance.json"), {"commit": "0123456789abcdef", "command": f"python {root}"})
    storage.write_json(run.at("images", "summary.json"), {"splits": {"train": {"count": 1200, "licenses": {"MIT": 200, "PD": 1000}}}})
    storage.write_json(run.at("prepare", "done.json"), {})
    storage.write_json(run.at("dvae", "done.json"), {"seconds": 90.0, "world_size": 2})
    writer = MetricsWriter(run.url, "dvae", 0)
    for number in range(evaluations):
        step = 2 * (number + 1)
        writer.scalars(step, {"train/loss": 1.0, "sched/tau": 1 / (1 + number)})
        writer.scalars(step, {"eval/elb_true": -0.5 + number, "eval/elb_relaxed": 0.25 + number, "eval/elb_gap": 0.75})
    writer.scalars(2 * evaluations + 1, {"sched/tau": 0.0})
    writer.close()
    return run.url


def test_curves_hold_the_evaluations_of_a_run_and_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = finished_run(tmp_path / "runs", 5)
    page_module.main(["--curves", url, "--out", str(tmp_path / "experiments")])
    text = (tmp_path / "experiments" / "tiny-curves.json").read_text()
    found = json.loads(text)
    assert found["updates"] == [2, 4, 6, 8, 10] and found["series"]["sched/tau"] == [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert "eval/psnr" not in found["series"] and str(tmp_path) not in text
    page = capsys.readouterr().out
    assert "| update | tau | ELB, true codes | ELB, relaxed codes | gap |" in page and "| 10 | 0.2 | 3.5 | 4.25 | 0.75 |" in page
    assert "1,200 training images (1,000 PD, 200 MIT), 1.5 minutes in 2 processes" in page
    monkeypatch.setattr(page_module, "DOCS", tmp_path)
    page_module.main(["--render"])
    rendered = (tmp_path / "experiments.md").read_text()
    assert page.strip() in rendered and "## What is missing" in rendered, "curves are no variants"


@pytest.mark.parametrize("count", [1, 11, 12, 13, 20, 100])
def test_the_shown_evaluations_are_the_first_ones_some_others_and_the_last(count: int) -> None:
    shown = curves._shown(count)
    assert len(shown) == min(count, 12) == len(set(shown)) and shown == sorted(shown)
    assert shown[0] == 0 and shown[-1] == count - 1 and shown[: min(count, 4)] == list(range(min(count, 4)))


def test_curves_of_an_unfinished_run_are_refused(tmp_path: Path) -> None:
    url = finished_run(tmp_path, 1)
    Path(url, "dvae", "done.json").unlink()
    with pytest.raises(DataError, match=r"dvae/done\.json is missing: run 'launcher\.py dvae"):
        curves.collect(url)


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    page = (page_module.DOCS / "experiments.md").read_text()
    assert page == page_module.render(page_module.DOCS / "experiments"), "run: python -m train.experiments.page --render"
