"""What ``prepare --dry-run`` shows of records: names that strangers chose, as they may be printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_pipeline.sources.test_forms import FORMS
from tests.support.made_sets import png
from train.config import load_run
from train.stages.prepare_preview import preview


def test_ids_of_records_are_printed_escaped(tmp_path: Path) -> None:
    for name in ("good", "b\x1b[2Jad\u202e"):
        (tmp_path / f"{name}.png").write_bytes(png(1))
    (tmp_path / "good.txt").write_text("a picture of a dog in the snow")
    (tmp_path / "b\x1b[2Jad\u202e.txt").write_text("")
    text = preview(load_run("tiny", [f'data.sources=["{tmp_path}"]']))
    assert "b\\x1b[2Jad\\u202e" in text and not [char for char in text if not (char.isprintable() or char == "\n")]


@pytest.mark.parametrize(
    ("form", "line"),
    [
        ("imagefolder", "images in key 'file_name', captions in 'text'"),
        ("hub", "images in column 'image', captions in "),
        ("open_clip", "images in column 'filepath', captions in 'title'"),
        ("flickr8k", "images in column 'image', captions in 'caption'"),
        ("tars", "images in member '.png', captions in '.txt'"),
    ],
)
def test_the_columns_that_were_found_are_said(tmp_path: Path, form: str, line: str) -> None:
    FORMS[form](tmp_path / "set")
    text = preview(load_run("tiny", [f"data.sources={tmp_path}/set", "data.min_side=8"]))
    found = [said for said in text.splitlines() if "images in" in said]
    assert len(found) >= 1 and all(said.startswith(f"# {tmp_path}/set: {line}") for said in found), text
    assert "# split: train " in text and "files" in text
