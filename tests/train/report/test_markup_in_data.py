"""Markup in whatever a run has read from others stays text, and a picture that is a link is none. About 4 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.fake_run import fake_run
from train.loop import gantt
from train.report.page import render
from train.report.view import RunView

HOSTILE = "<img src=x onerror=alert(1)>\"'</script>"


def spoiled(value: Any, key: str = "") -> Any:
    """Markup at the end of every text but names of files, and of every name that data may have."""
    if isinstance(value, str):
        return value if key in ("file", "truth") else value + HOSTILE
    if isinstance(value, list):
        return [spoiled(each, key) for each in value]
    if isinstance(value, dict):
        free = key in ("dropped", "dropped_captions", "sources", "versions", "licenses", "not_read", "files")
        return {(f"{name}{HOSTILE}" if free else name): spoiled(each, name) for name, each in value.items()}
    return value


def test_markup_in_captions_names_notes_and_files_is_escaped_on_the_page(tmp_path: Path) -> None:
    run = fake_run(tmp_path / f"a<b onclick=x>{'&'}")
    for name in ("prepare/done.json", "tokenizer/done.json", "generate/index.json", "provenance.json"):
        (run / name).write_text(json.dumps(spoiled(json.loads((run / name).read_text()))))
    summary = json.loads((run / "prepare" / "done.json").read_text())
    summary["summary"]["takedown"] = {"lines": 2, "without_match": 1, "examples": [HOSTILE]}
    (run / "prepare" / "done.json").write_text(json.dumps(summary))
    page = render(RunView(str(run)))
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") > 20
    assert "<img src=x" not in page and "<b onclick" not in page and "'</script>" not in page


def test_markup_in_the_parts_of_an_update_is_escaped() -> None:
    page = gantt.page(HOSTILE, {1: [[(HOSTILE, 0.0, 1.0)]]})
    assert "<img" not in page and page.count("&lt;img src=x") == 3


def test_a_picture_that_is_a_link_does_not_stand_in_a_page_that_is_passed_on(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    (tmp_path / "secret").write_bytes(b"a secret of this machine")
    picture = next((run / "generate").rglob("*.png"))
    view = RunView(str(run))
    assert view.picture(str(picture.relative_to(run)))
    picture.unlink()
    picture.symlink_to(tmp_path / "secret")
    assert RunView(str(run)).picture(str(picture.relative_to(run))) is None
