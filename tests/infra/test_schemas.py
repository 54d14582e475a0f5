"""Stored formats of another version of this code are refused with what to do, and never misread or dropped as damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.tokenizer import load_tokenizer
from infra import storage
from infra.digests import digest
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from tests.support.stopped_run import FIXTURE, STOPPED
from train.config import load_run
from train.verbs import status
from train.weights import checkpoint, export


@pytest.fixture
def run(tmp_path: Path) -> str:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return str(tmp_path / "run")


def write(url: str, **changes: object) -> None:
    found = storage.read_json(url) | changes
    if "sha256" in found:
        found.pop("sha256")
        found["sha256"] = digest(found)
    storage.write_json(url, found)


@pytest.mark.parametrize("schema", ["checkpoint/0", "checkpoint/3"])
def test_a_checkpoint_of_another_schema_is_refused_and_not_fallen_back_over(run: str, schema: str) -> None:
    url = checkpoint.folder(f"{run}/dalle", STOPPED)
    assert checkpoint.read_meta(url)["step"] == STOPPED
    write(f"{url}/meta.json", schema=schema)
    for read in (
        lambda: checkpoint.read_meta(url),
        lambda: checkpoint.load(f"{run}/dalle", STOPPED, {}),
        lambda: checkpoint.read_tensors(url, "average"),
    ):
        with pytest.raises(ConfigError, match=rf"schema '{schema}', and this version reads 'checkpoint/2'.*launcher\.py dalle PRESET run\.name=NAME"):
            read()


def test_an_export_of_another_schema_is_refused_with_the_command_that_makes_it_anew(run: str) -> None:
    export.describe(f"{run}/dvae/export")
    write(f"{run}/dvae/export/config.json", schema="export/2")
    with pytest.raises(ConfigError, match=r"schema 'export/2'.*launcher\.py export RUN_FOLDER --stage STAGE"):
        export.describe(f"{run}/dvae/export")


def test_a_tokenizer_of_another_schema_is_refused_with_the_command_that_makes_it_anew(run: str) -> None:
    tokenizer = load_run(run, []).tokenizer
    load_tokenizer(f"{run}/tokenizer", tokenizer)
    write(f"{run}/tokenizer/manifest.json", schema="tokenizer/2")
    with pytest.raises(ConfigError, match=r"schema 'tokenizer/2'.*launcher\.py tokenizer RUN_FOLDER"):
        load_tokenizer(f"{run}/tokenizer", tokenizer)


def test_a_run_folder_of_another_schema_is_refused_by_whatever_opens_it(run: str) -> None:
    load_run(run, [])  # one without a number is of schema 1, which is read
    RunFolder(run).claim(storage.read_json(f"{run}/config.json"), "")
    assert storage.read_json(f"{run}/provenance.json")["schema"] == "run/2", "gone on with, it holds what readers of 1 would misread"
    load_run(run, [])
    write(f"{run}/provenance.json", schema="run/3")
    for opens in (lambda: load_run(run, []), lambda: status.main([run])):
        with pytest.raises(ConfigError, match=r"schema 'run/3', and this version reads 'run/2'.*launcher\.py demo PRESET run\.name=NAME"):
            opens()
