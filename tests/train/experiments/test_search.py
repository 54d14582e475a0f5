"""The comparison of search with the best of N. About 3 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.clip import Clip
from tests.support import drawable_run
from train.config import load_run
from train.experiments import search
from train.weights import export

CAPTIONS = ("a red fox", "a blue house", "sea")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"), "dalle_fit.caption_dropout=0.1", "dvae.image_size=24").url


def judge(url: str, folder: str) -> str:
    cfg = load_run(url, [])
    torch.manual_seed(9)
    clip = Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)
    parents = export.describe(f"{url}/clip/export")["parents"]
    export.write(folder, clip.state_dict(), cfg.clip, parents=parents)
    return folder


def test_a_comparison_goes_on_where_it_was_and_is_judged_later(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(count: int, *more: str) -> dict[str, Any]:
        (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS[:count]))
        given = [url, "--captions", str(tmp_path / "captions.txt"), "--n", "2,4", "--out", str(tmp_path / "found.json"), *more]
        assert search.main(given) == 0
        found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
        return found

    two = run(2)
    assert two["by_n"]["4"]["search_minus_best_of_n"]["by"] == "ranking_model" and len(two["chosen"]["2"]["search"]) == 2
    drawn: list[str] = []
    best = search._best

    def noted(models: Any, caption: str, settings: Any) -> dict[str, Any]:
        drawn.append(caption)
        return best(models, caption, settings)

    monkeypatch.setattr(search, "_best", noted)
    three = run(3)
    assert drawn == ["sea"] * 4 and all(three["chosen"][n][way][:2] == two["chosen"][n][way] for n in ("2", "4") for way in search.WAYS)
    monkeypatch.setattr(search, "_best", lambda *_: pytest.fail("a picture was drawn again"))
    judged = run(3, "--judge", judge(url, str(tmp_path / "judge")))
    assert judged["by_n"]["2"]["search"]["score_by_ranking_model"] == three["by_n"]["2"]["search"]["score_by_ranking_model"]
    difference = judged["by_n"]["4"]["search_minus_best_of_n"]
    assert difference["by"] == "judge" and "recall_at_1" in judged["by_n"]["4"]["best_of_n"]
    values = [judged["by_n"]["4"][way]["score_by_judge"] for way in ("search", "best_of_n")]
    assert difference["mean"] == pytest.approx(values[0] - values[1], abs=1e-6)
    assert run(2)["by_n"] == two["by_n"], "fewer captions are a part of more"


@pytest.mark.parametrize(
    ("captions", "more", "message"),
    [
        ("a\nb", ["--n", "8,1"], "--n 8,1: accepted are numbers from 2 on"),
        ("a\nb", ["--n", "8,x"], "--n 8,x: accepted are numbers from 2 on"),
        ("a", [], "one caption; a comparison takes at least two"),
        ("a\nb", ["--judge", "{url}/clip/export"], "the model that ranks; name another one"),
        ("a\nb", ["--guidance", "-1"], "guidance = -1.0: accepted are"),
        ("a\nc", [], "its pictures were drawn with another value of 'captions'; name another file"),
        ("a\nb", ["--guidance", "2"], "its pictures were drawn with another value of 'settings'; name another file"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    url: str, captions: str, more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "captions.txt").write_text(captions)
    if "name another file" in message:
        models = search.open_models(url, rerank="clip")
        shape = {name: value for name, value in search.Settings().shape().items() if name != "n"}
        drawn_with = {"captions": ["a", "b"], "settings": shape, "weights": models.lineage, "precision": models.precision}
        (tmp_path / "found.json").write_text(json.dumps({"drawn_with": drawn_with, "chosen": {}}))
    monkeypatch.setattr(search, "_best", lambda *_: pytest.fail("a picture was drawn"))
    given = [url, "--captions", str(tmp_path / "captions.txt"), "--out", str(tmp_path / "found.json"), *[word.replace("{url}", url) for word in more]]
    assert search.main(given) in (64, 65, 78)
    assert message in capsys.readouterr().err
