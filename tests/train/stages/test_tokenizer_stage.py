"""The stage tokenizer where runs share the place of one. Under a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline import tokenizer
from data_pipeline.config import TokenizerConfig
from infra.errors import DataError
from tests.data_pipeline.test_tokenizer import CAPTIONS, image_set
from train.config import load_run
from train.stages.tokenizer import check_shared


def test_a_tokenizer_in_a_place_that_runs_share_is_used_or_refused(tmp_path: Path) -> None:
    url = str(tmp_path / "tokenizer")
    cfg = load_run("tiny", [f"data.tokenizer={url}", "tokenizer.vocab=400"])
    same, pear = image_set(str(tmp_path / "a"), CAPTIONS), image_set(str(tmp_path / "b"), ["a blue pear"])
    check_shared(cfg, pear.content_hash)  # nothing is there yet
    tokenizer.run(TokenizerConfig(vocab=400, max_tokens=16), same, url)
    check_shared(cfg, same.content_hash)
    with pytest.raises(
        DataError, match=r"data\.tokenizer = .*: holds a tokenizer of other captions, .*; name another folder, or leave data\.tokenizer empty"
    ):
        check_shared(cfg, pear.content_hash)
    with pytest.raises(DataError, match=r"holds a tokenizer of other captions and settings"):
        check_shared(load_run("tiny", [f"data.tokenizer={url}", "tokenizer.vocab=500"]), pear.content_hash)
