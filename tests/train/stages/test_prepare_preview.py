"""What ``prepare --dry-run`` shows of records: names that strangers chose, as they may be printed."""

from __future__ import annotations

from pathlib import Path

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
