"""What ``prepare --dry-run`` shows of records: names that strangers chose, as they may be printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.prepare import parts
from infra.world import World
from tests.data_pipeline.sources.test_forms import FORMS
from tests.support.made_sets import png
from train.config import load_run
from train.run import places
from train.stages.prepare_preview import plan_of, preview


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


def test_an_empty_split_is_said_before_anything_is_read_for_long(tmp_path: Path) -> None:
    (tmp_path / "set/val").mkdir(parents=True)
    for number in range(6):
        (tmp_path / "set/val" / f"{number}.png").write_bytes(png(number, 20))
        (tmp_path / "set/val" / f"{number}.txt").write_text(f"a picture of dog number {number} in the snow")
    text = preview(load_run("tiny", [f"data.sources={tmp_path}/set", "data.min_side=8", "data.share=1"]))
    assert "# split: train 0, validation 6" in text
    assert (
        "# no record in the train split: 'prepare' would end with 65. The data call all of it validation: add data that is called train, or give"
        in text
    )
    text = preview(
        load_run("tiny", [f'data.sources={{url="{tmp_path}/set", split="hash"}}', "data.min_side=8", "data.share=1", "data.validation_share=0.5"])
    )
    assert "would end" not in text


def test_the_dry_run_says_which_parts_are_there_looked_at_and_made_and_why(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(6):
        (tmp_path / "set" / f"{number}.png").write_bytes(png(number, 64))
        (tmp_path / "set" / f"{number}.txt").write_text(f"a picture of dog number {number} in the snow")
    words = [f'data.sources=["{tmp_path}/set"]', f"run.root={tmp_path}", "data.records_per_part=2", "data.min_side=8", "data.share=1"]
    cfg = load_run("tiny", words)
    plan, where = plan_of(cfg), places.images(cfg, places.run_folder(cfg))
    size, units = sum(path.stat().st_size for path in (tmp_path / "set").iterdir()), len(plan.units)
    before = preview(cfg)
    assert f"# 0 of {units} parts are there\n# {units} parts are made: at most {size:,} bytes are read" in before
    assert f"{units:6d}  parts are made: new\n" in before and not Path(where).exists()
    parts.run(plan, where, World.single())
    assert f"# {units} of {units} parts are there\n" in preview(cfg) and "parts are made" not in preview(cfg)
    for path in (tmp_path / "set").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    after = preview(cfg)
    assert (
        f"# {units} inputs are of the names and sizes of before, with another time or ETag" in after
        and f"read once (at most {size:,} bytes)" in after
    )
    assert f"{units:6d}  parts are made: another value of data.validation_share\n" in preview(load_run("tiny", [*words, "data.validation_share=0.4"]))
