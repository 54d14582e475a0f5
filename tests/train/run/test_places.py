"""The run folder and its configuration: keys that it lacks, keys that may change, and where it lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from train import launch
from train.config import load_run
from train.run import places


def claimed(root: Path | str, *words: str) -> RunFolder:
    """The folder of a run of the tiny preset, claimed."""
    cfg = load_run("tiny", [f'run.root="{root}"', *words])
    run = places.run_folder(cfg)
    places.claim(cfg, run, "test")
    return run


def without(run: RunFolder, *keys: str) -> dict[str, Any]:
    """Take keys out of the stored configuration, as if the run were older than they."""
    config: dict[str, Any] = storage.read_json(run.config_url)
    for key in keys:
        section, _, name = key.partition(".")
        if name:
            del config[section][name]
        else:
            del config[section]
    storage.write_json(run.config_url, config)
    return config


def test_a_run_that_is_older_than_a_key_is_no_other_run(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    older = without(run, "dalle_fit.caption_dropout", "scales", "dvae.pool")
    claimed(tmp_path)
    assert storage.read_json(run.config_url) == older, "and nothing is written for it"
    assert load_run(run.url, []).scales.initial == 13, "the folder alone names the run, too"
    with pytest.raises(ConfigError, match=r"dvae\.pool: 'max' -> 'average'"):
        claimed(tmp_path, "dvae.pool=average")


def test_keys_that_say_how_change_at_any_time_and_are_noted(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    claimed(tmp_path, "zero.stage=3", "dalle_fit.accumulation=2", "data.workers=1")
    (change,) = storage.read_json(run.at("provenance.json"))["changes"]
    assert change["changed"] == ["dalle_fit.accumulation: 1 -> 2", "data.workers: 0 -> 1", "zero.stage: 2 -> 3"]
    assert load_run(run.url, []).zero.stage == 3


def test_the_folder_that_is_named_is_the_run_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = claimed(tmp_path / "runs", "run.name=mine")
    config = Path(run.config_url).read_text()
    assert "root" not in json.loads(config)["run"] and str(tmp_path) not in config, "its place is no part of the configuration"
    copy = tmp_path / "other [place]" / "a copy, 100 %"
    shutil.copytree(run.url, copy)
    for named in (str(copy), f"{copy}/", f"{copy}//", str(copy / "config.json"), f"file://{copy}".replace("%", "%25")):
        assert storage.absolute(places.run_folder(load_run(named, [])).url) == str(copy), named
    monkeypatch.chdir(copy.parent)
    assert places.run_folder(load_run("a copy, 100 %", [])).url == "./a copy, 100 %"
    monkeypatch.chdir(copy)
    for named in (".", "config.json", "../a copy, 100 %"):
        assert Path(places.run_folder(load_run(named, [])).url).resolve() == copy, named
    assert places.run_folder(load_run(str(copy), ["run.name=next"])).url == str(copy.parent / "next"), "a new run lies beside it"


def test_a_moved_folder_goes_on_and_provenance_keeps_its_places(tmp_path: Path) -> None:
    run = claimed(tmp_path / "runs", "run.name=mine")
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    Path(run.url).rename(moved)
    cfg = load_run(str(moved), [])
    places.claim(cfg, places.run_folder(cfg), "test")
    places.claim(cfg, places.run_folder(cfg), "test")
    assert not Path(run.url).exists()
    assert [place["url"] for place in storage.read_json(str(moved / "provenance.json"))["places"]] == [run.url, str(moved)]


def test_a_configuration_without_provenance_is_a_preset_and_no_run(tmp_path: Path) -> None:
    """A config.json that was downloaded must not make a run of the folder that it happens to lie in."""
    shutil.copy(claimed(tmp_path).config_url, tmp_path / "config.json")
    assert places.run_folder(load_run(str(tmp_path / "config.json"), [])).url == "runs/run"


def test_a_preset_beside_a_run_folder_of_the_same_name_is_not_taken_for_it(tmp_path: Path) -> None:
    run = claimed(tmp_path, "run.name=mine")
    (tmp_path / "mine.toml").write_text("[run]\nseed = 7\n")
    assert load_run(run.url, []).run.seed == 0


def test_a_run_folder_on_s3_is_the_one_that_is_named(s3: str) -> None:
    run = claimed(f"{s3}/runs", "run.name=mine")
    for name in ("config.json", "provenance.json"):
        storage.write_bytes(f"{s3}/a copy [2]/{name}", storage.read_bytes(run.at(name)))
    assert places.run_folder(load_run(f"{s3}/a copy [2]/", [])).url == f"{s3}/a copy [2]"


def test_a_bucket_itself_is_no_run_folder(s3: str, s3_bucket: str) -> None:
    run = claimed(f"{s3}/runs")
    for name in ("provenance.json", "config.json"):
        storage.write_bytes(f"s3://{s3_bucket}/{name}", storage.read_bytes(run.at(name)))
    try:
        with pytest.raises(ConfigError, match="a run folder must be inside a folder or below a bucket"):
            load_run(f"s3://{s3_bucket}", [])
    finally:
        for name in ("provenance.json", "config.json"):
            storage.delete(f"s3://{s3_bucket}/{name}")


@pytest.mark.parametrize("store", ["local", "s3"])
def test_of_two_first_launchers_with_other_values_one_makes_the_run_and_nothing_of_the_other_remains(
    store: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path) if store == "local" else str(request.getfixturevalue("s3"))
    cfg = load_run("tiny", [f'run.root="{root}"', "dvae.pool=average"])
    run, look = places.run_folder(cfg), RunFolder.stored
    early: list[None] = []

    def looked_too_early(folder: RunFolder) -> dict[str, Any] | None:
        """The second launcher looks, finds no run, and meanwhile the first one makes it."""
        if not early:
            early.append(None)
            claimed(root)
            return None
        return look(folder)

    monkeypatch.setattr(RunFolder, "stored", looked_too_early)
    with pytest.raises(ConfigError, match=r"dvae\.pool: 'max' -> 'average'"):
        places.claim(cfg, run, "second")
    assert load_run(run.config_url, []).dvae.pool == "max"
    assert storage.read_json(run.at("provenance.json"))["command"] == "test"


def test_a_folder_whose_maker_was_killed_before_its_configuration_is_taken(tmp_path: Path) -> None:
    cfg = load_run("tiny", [f'run.root="{tmp_path}"'])
    run = places.run_folder(cfg)
    storage.write_json(run.at("provenance.json"), {"schema": "run/0", "command": "killed"})
    claimed(tmp_path)
    assert storage.read_json(run.at("provenance.json"))["command"] == "test" and storage.exists(run.config_url)


def test_a_launcher_that_is_refused_a_stage_leaves_the_values_of_the_one_that_works(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    before = Path(run.config_url).read_bytes()
    with run.lock("prepare"), pytest.raises(ConfigError, match="another launcher"):
        launch.stage("prepare", run.url, ["data.workers=1"], on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())
    assert Path(run.config_url).read_bytes() == before
