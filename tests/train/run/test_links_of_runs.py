"""Links below a run folder that lead out of it: read through, and neither written nor deleted through. The run folder itself may be a link. About 2 s."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import files, output, storage
from infra.config import to_json
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.made_sets import image, make_images
from tests.support.shelf import tree
from train import launch
from train.config import load_run
from train.loop.metrics import MetricsWriter
from train.run import places
from train.verbs import collect
from train.weights import checkpoint
from train.weights.fragments import even_slice

SENTENCE = "a link that leads out of the run folder, to .*nothing is written or deleted through it.*cp -rL"


def made(root: Path, name: str = "mine", **data: str) -> RunFolder:
    """A run folder with its configuration."""
    run = RunFolder(str(root / name))
    cfg = load_run("tiny", [f"run.root={root}", f"run.name={name}", *(f"data.{key}={value}" for key, value in data.items())])
    run.claim(json.loads(to_json(cfg)), "test")
    return run


def save(stage_url: str, step: int, keep: int = 1) -> None:
    checkpoint.save(stage_url, step, {"model/w": even_slice(torch.full((8,), float(step)), 0, 1)}, {}, World.single(), keep)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """The stage folder of another run, with two checkpoints and a marker."""
    folder = tmp_path / "theirs" / "dalle"
    for step in (1, 2):
        save(str(folder), step, keep=9)
    (folder / "done.json").write_text(json.dumps({"stage": "dalle", "updates": 2}))
    return folder


@pytest.mark.parametrize("linked", ["dalle", "dalle/checkpoints"])
def test_a_checkpoint_is_not_saved_through_a_link_and_supersedes_none_behind_it(linked: str, theirs: Path, tmp_path: Path) -> None:
    run = made(tmp_path)
    link = tmp_path / "mine" / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(theirs.parent / linked)
    before = tree(theirs)
    with pytest.raises(ConfigError, match=f"^{link}: {SENTENCE}"):
        save(run.at("dalle"), 3)
    assert tree(theirs) == before
    assert list(checkpoint.complete(run.at("dalle"))) == [1, 2], "what lies there can be read"


def test_whatever_writes_below_a_run_folder_stays_in_it(theirs: Path, tmp_path: Path) -> None:
    run = made(tmp_path)
    for name in ("dalle", "tensorboard", "logs"):
        (tmp_path / "mine" / name).symlink_to(theirs)
    before = tree(theirs)
    writers: list[Any] = [
        lambda: storage.write_json(run.at("dalle", "done.json"), {}),
        lambda: storage.create_once(run.at("dalle", "new", "0.json"), b"x"),
        lambda: storage.upload_file(theirs / "done.json", run.at("dalle", "export", "a")),
        lambda: storage.delete(run.at("dalle", "done.json")),
        lambda: storage.delete_prefix(run.at("dalle", "checkpoints", "step-00000001")),
        lambda: MetricsWriter(run.url, "dalle", 0),
        lambda: MetricsWriter(run.url, "generate", 0, lines=False).text(1, "words", "words"),
        lambda: output.copy_to(storage.local_path(run.at("logs", "rank-0.log"))),
        lambda: run.finish("dalle"),
    ]
    for write in writers:
        with pytest.raises(ConfigError, match=SENTENCE):
            write()
    assert tree(theirs) == before
    assert run.done("dalle") == {"stage": "dalle", "updates": 2}


def test_nothing_is_deleted_through_a_link_anywhere(theirs: Path, tmp_path: Path) -> None:
    before = tree(theirs)
    (tmp_path / "name").symlink_to(theirs)
    for delete in (lambda: storage.delete_prefix(str(tmp_path / "name")), lambda: files.delete_tree(tmp_path / "name")):
        with pytest.raises(ConfigError, match=rf"name: a link, to {theirs}; nothing is deleted through it"):
            delete()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").symlink_to(theirs)
    storage.delete_prefix(str(tmp_path / "folder"))
    assert not (tmp_path / "folder").exists() and tree(theirs) == before
    storage.delete(str(tmp_path / "name"))
    assert not (tmp_path / "name").is_symlink() and tree(theirs) == before, "of a link, the link itself"


@pytest.mark.parametrize("linked", ["report", "exits", "exits/report", "locks", "tensorboard"])
def test_a_stage_looks_for_links_before_it_begins(linked: str, theirs: Path, tmp_path: Path) -> None:
    made(tmp_path)
    link = tmp_path / "mine" / linked
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(theirs)
    before = tree(theirs)
    with pytest.raises(ConfigError, match=f"^{link}: {SENTENCE}"):
        launch.stage("report", str(tmp_path / "mine"), [], on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())
    assert tree(theirs) == before


def test_what_earlier_stages_wrote_may_be_linked_for_reading(theirs: Path, tmp_path: Path) -> None:
    """Another run's images, dVAE or codes; and a link that stays inside."""
    run = made(tmp_path)
    images = make_images(str(tmp_path / "theirs" / "images" / "train"), [[image(number) for number in range(3)]])
    for name in ("images", "dalle"):
        (tmp_path / "mine" / name).symlink_to(tmp_path / "theirs" / name)
    (tmp_path / "mine" / "generate" / "later").mkdir(parents=True)
    (tmp_path / "mine" / "generate" / "newest").symlink_to(tmp_path / "mine" / "generate" / "later")
    run.refuse_links("generate", "evaluate", "report")
    with pytest.raises(ConfigError, match=SENTENCE):
        run.refuse_links("images", "prepare")
    cfg = load_run(run.url, [])
    assert images.url.endswith("theirs/images/train") and storage.exists(storage.join(places.image_set(cfg, run, "train"), "manifest.json"))
    storage.write_bytes(run.at("generate", "newest", "0.png"), b"x")


def test_a_run_folder_that_is_a_link_is_worked_in(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "elsewhere").mkdir()
    (tmp_path / "root" / "mine").symlink_to(tmp_path / "scratch" / "elsewhere")
    run = made(tmp_path / "root")
    run.refuse_links("dalle")
    for step in (1, 2):
        save(run.at("dalle"), step)
    assert os.listdir(tmp_path / "scratch" / "elsewhere" / "dalle" / "checkpoints") == ["step-00000002"]


def test_collect_leaves_alone_what_links_lead_to(tmp_path: Path) -> None:
    run = made(tmp_path)
    theirs = tmp_path / "theirs"
    for number in range(2):  # a superseded version, which no run below this root names
        make_images(str(theirs / "images" / "train"), [[image(number)], [image(number + 5)]][: number + 1])
    for step in (1, 2):
        save(str(theirs / "dalle"), step, keep=9)
    (theirs / "dalle" / "checkpoints" / "step-00000001" / "meta.json").unlink()
    for name in ("images", "dalle"):
        (tmp_path / "mine" / name).symlink_to(theirs / name)
    for file in (each for each in theirs.rglob("*") if each.is_file()):
        os.utime(file, (time.time() - 30 * 86400,) * 2)
    before = tree(theirs)
    collect.main(run.url, 7, [], delete=True)
    assert tree(theirs) == before
    for name in ("images", "dalle"):
        (tmp_path / "mine" / name).unlink()
        shutil.copytree(theirs / name, tmp_path / "mine" / name)
    for file in (each for each in (tmp_path / "mine").rglob("*") if each.is_file()):
        os.utime(file, (time.time() - 30 * 86400,) * 2)
    collect.main(run.url, 7, [], delete=True)
    assert not (tmp_path / "mine" / "dalle" / "checkpoints" / "step-00000001").exists(), "its own goes"
