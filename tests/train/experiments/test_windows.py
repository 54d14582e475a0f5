"""Windows of drafts on a trained model: the table of passes and seconds. Seconds: about 4."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import drawable_run
from train.experiments import windows


def test_windows_are_compared_on_a_run_and_change_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = drawable_run.make(str(tmp_path / "mine"))
    assert windows.main([run.url, "a red fox", "a blue house", "--out", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(capsys.readouterr().out) == found
    rows = found["windows"]
    assert list(rows) == ["1", "2", "4"], "no window is wider than this model's row of 4 codes"
    assert rows["1"]["passes"] == 16 and rows["1"]["fewer_passes"] == rows["1"]["less_time"] == 1
    assert [row["changed_codes"] for row in rows.values()] == [0, 0, 0]
    assert all(4 <= row["passes"] <= 16 for row in rows.values())


def test_what_cannot_be_drawn_with_ends_with_its_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = drawable_run.make(str(tmp_path / "mine"))
    assert windows.main([run.url, "a red fox", "--guidance", "3"]) == 78
    assert "guidance = 3.0: this model was trained with dalle_fit.caption_dropout = 0" in capsys.readouterr().err
    assert windows.main([str(tmp_path), "a red fox"]) == 78
