"""Work that independent launchers divide: shares from the environment, and stages whose last share merges."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA, open_set
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import Share, World
from train import launch
from train.config import load_run
from train.run.stage_table import used_by
from train.verbs import takedown

_VARIABLES = ("LAUNCHER_SHARE", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")
BASE = ["dvae_fit.steps=4", "dvae_fit.precision=fp32", "data.records_per_part=1024", "encode.crops=2"]


@pytest.fixture(autouse=True)
def no_share(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop("LAUNCHER_SHARE", None)  # the launcher hands its share to its ranks


def stage(name: str, root: Path, *overrides: str, share: str = "") -> None:
    os.environ.pop("LAUNCHER_SHARE", None)
    words = [f"run.root={root}", *BASE, *overrides]
    launch.stage(name, "tiny", words, on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag(), share=share)


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_ranks_of_all_shares_are_numbered_through() -> None:
    places = [Share(index, 3).of(World(rank, 2, rank, 2)) for index in range(3) for rank in range(2)]
    assert [(place.rank, place.size) for place in places] == [(number, 6) for number in range(6)]
    assert (Share().label("prepare"), Share(1, 3).label("prepare")) == ("prepare", "prepare.1-of-3")


def test_shares_in_any_order_make_the_sets_of_one_process_and_the_last_merges(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("prepare", "dvae", "encode"):
        stage(name, tmp_path / "one")
    for name in ("prepare", "dvae", "encode"):
        shares = ("2/3", "0/3", "1/3") if name != "dvae" else ("",)
        for position, share in enumerate(shares):
            assert not (tmp_path / "three" / "tiny" / name / "done.json").exists()
            stage(name, tmp_path / "three", share=share)
            if share and position < 2:
                assert "are left to others" in capfd.readouterr().out
        assert (tmp_path / "three" / "tiny" / name / "done.json").exists()
    for kind in ("images", "codes"):
        assert tree(tmp_path / "one" / "tiny" / kind) == tree(tmp_path / "three" / "tiny" / kind)
    assert len(list((tmp_path / "three" / "tiny" / "images" / "train").glob("part-*"))) > 3
    with pytest.raises(ConfigError, match=r"--share 0/2: 'dvae' is not divided among launchers; prepare, encode, generate are"):
        stage("dvae", tmp_path / "three", share="0/2")


def test_captions_are_divided_and_the_pictures_are_those_of_one_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    short = ["dalle_fit.steps=2", "clip_fit.steps=2", "generate.num_captions=4", "generate.candidates=2"]
    stages = list(used_by(load_run("tiny", [])))
    for name in stages[: stages.index("generate")]:
        stage(name, tmp_path / "one", *short)
    shutil.copytree(tmp_path / "one", tmp_path / "three")
    config = json.loads((tmp_path / "three" / "tiny" / "config.json").read_text())
    config["run"]["root"] = str(tmp_path / "three")
    (tmp_path / "three" / "tiny" / "config.json").write_text(json.dumps(config))
    stage("generate", tmp_path / "one", *short)
    one, three = (tmp_path / name / "tiny" / "generate" for name in ("one", "three"))
    for position, share in enumerate(("2/3", "0/3", "1/3")):
        stage("generate", tmp_path / "three", *short, share=share)
        assert ("are left to others" in capfd.readouterr().out) == (position < 2) == (not (three / "done.json").exists())
    marker = (three / "done.json").read_text()
    for folder in (one, three):
        (folder / "done.json").unlink()
    assert tree(one) == tree(three) and len(json.loads((one / "index.json").read_text())["captions"]) == 4
    before = {path: path.stat().st_mtime_ns for path in three.rglob("caption-*/*")}
    stage("generate", tmp_path / "three", *short, share="0/3")
    assert {path: path.stat().st_mtime_ns for path in three.rglob("caption-*/*")} == before, "a finished caption was drawn again"
    (three / "done.json").unlink()
    assert tree(one) == tree(three) and json.loads(marker)["summary"] == {"captions": 4, "pictures": 8}, "merging again changes nothing"


def test_appended_data_encode_only_what_is_new_and_a_run_keeps_its_version(tmp_path: Path) -> None:
    shared = [f"data.images={tmp_path}/images", f"data.codes={tmp_path}/codes"]
    for name in ("prepare", "dvae", "encode"):
        stage(name, tmp_path, "run.name=first", *shared)
    first = json.loads((tmp_path / "first" / "prepare" / "done.json").read_text())
    codes = tree(tmp_path / "codes")
    more = ["run.name=second", *shared, "data.share=0.06"]  # other groups: other parts
    stage("prepare", tmp_path, *more)
    second = json.loads((tmp_path / "second" / "prepare" / "done.json").read_text())
    assert first["versions"] != second["versions"]
    (tmp_path / "first" / "encode" / "done.json").unlink()
    stage("encode", tmp_path, "run.name=first", *shared)
    assert tree(tmp_path / "codes") == codes, "the first run reads its own version, and finds everything encoded"


def test_a_take_down_deletes_bytes_and_the_stages_make_the_rest_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "takedown.txt"
    listed.write_text("nobody\n")
    words = (f"data.takedown={listed}",)
    for name in ("prepare", "dvae", "encode"):
        stage(name, tmp_path, *words)
    run, arguments = tmp_path / "tiny", [f"run.root={tmp_path}", *BASE, *words]
    before = open_set(f"{run}/images/train", IMAGE_SCHEMA)
    victim = next(iter(before.records()))["id"]
    takedown.main("tiny", arguments, dry_run=False)
    said = capfd.readouterr().out
    assert "1 of 1 lines of" in said and "name no record that is stored here: 'nobody'" in said and "no record of the list is in the sets" in said
    with RunFolder(str(run)).lock("dalle"), pytest.raises(ConfigError, match="another launcher runs 'dalle' in this folder"):
        takedown.main("tiny", arguments, dry_run=False)
    listed.write_text(f"{victim}\n")
    assert victim not in [record["id"] for record in open_set(f"{run}/codes/crop-0/train", CODES_SCHEMA, takedown=str(listed)).records()]
    takedown.main("tiny", arguments, dry_run=True)
    assert (run / "prepare" / "done.json").exists() and "1 record in 1 part" in capfd.readouterr().out
    takedown.main("tiny", arguments, dry_run=False)
    with pytest.raises(DataError, match="run the stage 'prepare' first"):
        open_set(f"{run}/images/train", IMAGE_SCHEMA)
    for name in ("prepare", "encode"):
        stage(name, tmp_path, *words)
    for url, schema in ((f"{run}/images/train", IMAGE_SCHEMA), (f"{run}/codes/crop-1/train", CODES_SCHEMA)):
        after = open_set(url, schema)
        assert victim not in [record["id"] for record in after.records()] and after.count == before.count - 1
    assert not [path for path in run.rglob("*.mds") if victim.encode() in path.read_bytes()]
    with pytest.raises(ConfigError, match=r"data.takedown = '': a list of at least one id is needed"):
        takedown.main("tiny", [f"run.root={tmp_path}", *BASE], dry_run=False)


def test_a_training_stage_reads_sources_by_their_weights(tmp_path: Path) -> None:
    for name in ("prepare", "dvae"):
        stage(name, tmp_path, 'data.sources=[{url="emoji", weight=2.0}]')
    (checkpoint,) = (tmp_path / "tiny" / "dvae" / "checkpoints").glob("step-*4/meta.json")
    assert json.loads(checkpoint.read_text())["loader"]["weights"] == {"emoji": 2.0}
