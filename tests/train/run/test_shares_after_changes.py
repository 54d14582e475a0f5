"""Stages that launchers divide, after the run went on longer, with another batch and another step size: every share does its work anew, and none merges what is old. About 20 s."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import storage
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.stopped_run import FIXTURE
from tests.train.stages.test_shares import tree
from train import launch
from train.config import load_run
from train.run import lineage

DRAWN = ("generate.num_captions=3", "generate.candidates=2")


@pytest.fixture(autouse=True)
def no_share(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LAUNCHER_SHARE", raising=False)
    yield
    os.environ.pop("LAUNCHER_SHARE", None)  # the launcher hands its share to its ranks


def stage(name: str, run: Path, *words: str, share: str = "", go_on: bool = False) -> None:
    os.environ.pop("LAUNCHER_SHARE", None)
    launch.stage(name, str(run), list(words), on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag(), share=share, go_on=go_on)


def of_weights(run: Path, stage: str, kind: str) -> str:
    return str(storage.read_json(f"{run}/{stage}/done.json")["parents"][kind])


def weights(run: Path, stage: str) -> str:
    return str(storage.read_json(f"{run}/{stage}/export/config.json")["content_hash"])


def test_codes_of_a_dvae_that_went_on_are_made_again_by_shares_as_by_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    shutil.copytree(FIXTURE / "run", one)
    shutil.rmtree(one / "dvae")
    shutil.copytree(FIXTURE / "dvae-stopped", one / "dvae")
    before = of_weights(one, "encode", "dvae")
    stage("dvae", one, "dvae_fit.steps=6", "dvae_fit.lr=1e-2", "dvae_fit.batch=2", go_on=True)
    shutil.copytree(one, three)
    stage("encode", one)
    cfg, run = load_run(str(three), []), RunFolder(str(three))
    for position, share in enumerate(("2/3", "0/3", "1/3")):
        assert lineage.out_of_date(cfg, run, "encode"), "what is half made is not taken for new"
        with pytest.raises(launch.StageFailed, match=r"made from dvae .*, but this run uses dvae .*; run 'encode' again"):
            stage("dalle", three)
        capfd.readouterr()
        stage("encode", three, share=share)
        assert ("are left to others" in capfd.readouterr().out) == (position < 2)
    assert of_weights(three, "encode", "dvae") == weights(three, "dvae") != before
    assert tree(one / "codes") == tree(three / "codes")
    assert storage.read_json(f"{one}/encode/done.json")["versions"] == storage.read_json(f"{three}/encode/done.json")["versions"]
    codes = tree(three / "codes")
    stage("encode", three, share="0/3")
    assert "encode: finished already" in capfd.readouterr().out and tree(three / "codes") == codes


def test_pictures_of_a_transformer_that_went_on_are_drawn_again_by_shares_as_by_one_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(FIXTURE / "run", one)
    for name in ("dalle", "clip"):
        stage(name, one)
    stage("generate", one, *DRAWN, share="1/2")
    stage("generate", one, *DRAWN, share="0/2")
    older = tree(one / "generate")
    stage("dalle", one, "dalle_fit.steps=10", "dalle_fit.lr=1e-2", "dalle_fit.batch=6", go_on=True)
    shutil.copytree(one, two)
    stage("generate", one, *DRAWN)
    cfg, run = load_run(str(two), list(DRAWN)), RunFolder(str(two))
    for position, share in enumerate(("1/2", "0/2")):
        assert lineage.out_of_date(cfg, run, "generate"), "half of the pictures are of the older weights"
        capfd.readouterr()
        stage("generate", two, *DRAWN, share=share)
        assert ("are left to others" in capfd.readouterr().out) == (position == 0)
    assert not lineage.out_of_date(cfg, run, "generate") and of_weights(two, "generate", "dalle") == weights(two, "dalle")
    for folder in (one, two):
        (folder / "generate" / "done.json").unlink()
    assert tree(one / "generate") == tree(two / "generate")
    drawn = {name: digest for name, digest in tree(two / "generate").items() if name.endswith("000.png") and name not in older}
    assert len(drawn) == 3 and not set(drawn.values()) & set(older.values()), "by the other weights, and beside the pictures of the older ones"
