"""Sweeps whose arms make codes of their own, and are judged by their drawings: one at the smallest size, the differences by captions, the page. About 25 s."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import ConfigError
from infra.repository import REPOSITORY
from infra.run_folder import RunFolder
from tests.system.test_training import copy_of
from tests.train.experiments.test_peer import in_process
from tests.train.experiments.test_sweep import run_of
from train.config import load_run
from train.evaluation.drawings import OWN_CLIP
from train.experiments import peer, sweep, sweep_drawings, sweep_page

FILE = """
name = "codes"
run = "{run}"
seeds = [0]
tokens = 512
drawings = 4
overrides = ["dalle_fit.precision=fp32", "evaluate.samples=8", "evaluate.best_of=[1,2]", "generate.candidates=2", "encode.min_code_use=0"]
[arms]
base = []
"8 codes" = ["dvae.vocab=8", "dvae_fit.steps=4", "dvae_fit.lr_steps=4"]
"""


def test_arms_make_their_own_codes_and_the_same_model_looks_at_all_drawings(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "subprocess", SimpleNamespace(run=in_process))
    url = str(copy_of(prepared, tmp_path / "runs") / "tiny")
    path, out = tmp_path / "codes.toml", tmp_path / "experiments" / "sweep-codes.json"
    path.write_text(FILE.format(run=url))
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 65 and not (Path(url) / "against").exists(), "stage clip is missing"
    peer.run_stage("clip", url, [], 1)
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0
    base, other = json.loads(out.read_text())["runs"]
    assert base["nats_per_code"] > other["nats_per_code"] > 0, "8 codes have less to say than 32"
    against = Path(url) / "against"
    places = {one["arm"]: next(against.glob(f"codes-{slug}-*-seed-0")) for one, slug in ((base, "base"), (other, "8-codes"))}
    assert not (places["base"] / "codes").exists() and (places["8 codes"] / "codes").exists()
    hashes = {json.loads((place / "clip" / "export" / "config.json").read_text())["content_hash"] for place in [*places.values(), Path(url)]}
    assert len(hashes) == 1, "one model looks at all drawings"
    for one in (base, other):
        found = one["drawings"]
        assert found["captions"] == 4 and list(found["retrieval"][OWN_CLIP]) == ["1"] and found["psnr_db"] > 0
        low, high = found["retrieval"][OWN_CLIP]["1"]["recall_at_1_interval"]
        assert low <= found["retrieval"][OWN_CLIP]["1"]["recall_at_1"] <= high
    assert "over_base" not in base["drawings"]
    first = {arm: json.loads((place / "evaluate" / "drawings.json").read_text())["retrieval"][OWN_CLIP]["by_n"]["1"] for arm, place in places.items()}
    less, error = other["drawings"]["over_base"]["recall_at_1"]
    assert less == pytest.approx(first["8 codes"]["recall_at_1"] - first["base"]["recall_at_1"]) and error >= 0
    assert "Drawings of 4 held-out captions" in sweep_page.section(json.loads(out.read_text()))


def drawings_of(place: Path, nearer: list[float], captions: str = "a") -> RunFolder:
    (place / "evaluate").mkdir(parents=True)
    (place / "evaluate" / "drawings.json").write_text(
        json.dumps({"captions_hash": captions, "retrieval": {OWN_CLIP: {"by_n": {"1": {"nearer": nearer}}}}})
    )
    return RunFolder(str(place))


def test_differences_are_of_the_same_captions(tmp_path: Path) -> None:
    """Of five captions the arm finds one more first, and loses none; and nothing is said without the figures of the base, or of other captions."""
    mine, base = drawings_of(tmp_path / "a", [0, 0, 3, 0.5, 20]), drawings_of(tmp_path / "b", [0, 2, 3, 30, 20])
    found = sweep_drawings.over(mine, base)
    assert found["recall_at_1"] == pytest.approx((0.4, (0.3 / 5) ** 0.5)) and found["recall_at_10"] == pytest.approx((0.2, 0.2))
    assert sweep_drawings.over(mine, RunFolder(str(tmp_path / "none"))) == {}
    assert sweep_drawings.over(mine, drawings_of(tmp_path / "c", [0] * 5, "other")) == {}


def judged(arm: str, seed: int, recall: float, over: list[float] | None) -> dict[str, Any]:
    found = {"recall_at_1": recall, "recall_at_10": 2 * recall, "recall_at_1_interval": [recall - 0.02, recall + 0.03]}
    drawn: dict[str, Any] = {"captions": 400, "psnr_db": 21.5, "code_use": 0.75, "code_perplexity": 99.6, "retrieval": {OWN_CLIP: {"1": found}}}
    drawn["mmd2"] = {OWN_CLIP: {"by_n": {"1": 0.5}, "halves_of_real": 0.1}, "net": {"by_n": {"1": 0.04, "4": 0.03}, "halves_of_real": 0.001}}
    drawn |= {"over_base": {"recall_at_1": over, "recall_at_10": over}} if over else {}
    return run_of(arm, seed, 2.0) | {"codes_per_picture": 256, "drawings": drawn}


def test_the_page_shows_drawings_beside_the_base() -> None:
    runs = [judged("base", 0, 0.1, None), judged("x", 0, 0.2, [0.1, 0.03]), judged("x", 1, 0.3, [0.2, 0.04])]
    said = sweep_page.drawings({"base": "base", "runs": runs})
    assert "Drawings of 400 held-out captions" in said and "by net, which gives 0.0010 between two halves" in said and "MMD, best of 4" in said
    assert "| base | 21.50 | 75.0% | 100 | 512 | 10.0% (8.0 to 13.0) | – | 20.0% | – | 0.0400 | 0.0300 |" in said
    assert "| x | 21.50 | 75.0% | 100 | 512 | 25.0% (23.0 to 28.0) | +15.0 ± 2.5 | 50.0% | +15.0 ± 2.5 | 0.0400 | 0.0300 |" in said
    assert sweep_page.drawings({"base": "base", "runs": [run_of("base", 0, 2.0)]}) == ""


def test_other_codes_take_tokens_and_not_minutes(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(FILE.format(run="x").replace("tokens = 512", "minutes = 3.0"))
    with pytest.raises(
        ConfigError, match=r"'dvae.vocab=8' makes other codes, on which no probe can be made beforehand: give tokens instead of minutes"
    ):
        sweep.read(path)


def test_the_sweep_over_numbers_of_codes_comes_with_the_code() -> None:
    file = sweep.read(REPOSITORY / "train" / "experiments" / "codes.toml")
    assert [load_run("demo", file.words(arm)).dvae.vocab for arm in file.arms] == [512, 128, 2048] and all(file.own_codes(arm) for arm in file.arms)
