"""Names are literal first: brackets, *, ?, spaces, % and trailing slashes in paths and keys, local and on S3."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from infra import slurm_submit, storage
from infra.commands import launcher
from infra.job import ClusterConfig, JobSpec
from train.verbs import collect, targets

FOLDER = "[set] a*b? 100%"
NAMES = (" leading.txt", "100% sure? no*.txt", "[brackets] 1.txt", "plus+and&.txt")


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def listed(url: str) -> list[str]:
    base, found = storage.glob(url)
    return sorted(storage.join(base, info.name) for info in found)


def test_a_folder_and_its_files_are_found_by_their_own_names_and_patterns_still_match(root: str) -> None:
    place = f"{root}/{FOLDER}"
    for name in NAMES:
        storage.write_bytes(f"{place}/{name}", b"x")
    storage.write_bytes(f"{root}/s aXb1 100%/other.txt", b"x")  # what the name would match as a pattern
    everything = sorted(f"{place}/{name}" for name in NAMES)
    for url in (place, f"{place}/", f"{place}//"):
        assert listed(url) == everything, url
    for name in NAMES:
        assert listed(f"{place}/{name}") == [f"{place}/{name}"], name
    assert listed(f"{root}/[s] a?b1*/*.txt") == [f"{root}/s aXb1 100%/other.txt"], "what does not exist is a pattern"
    assert listed(f"{root}/[[]set]*/[[]*.txt") == [f"{place}/[brackets] 1.txt"]
    assert listed(f"{place}/*.txt") == everything, "so are the folders of a pattern"
    storage.write_bytes(f"{place}/below [1]/x.txt", b"x")
    assert listed(f"{place}/below [1]/*.txt") == [f"{place}/below [1]/x.txt"]


def test_sets_and_runs_are_recognised_below_such_names(root: str) -> None:
    place = f"{root}/{FOLDER}"
    storage.write_json(f"{place}/set/train/manifest.json", {"schema": "image/1"})
    assert targets.schema_of(f"{place}/set/train") == "image/1"
    assert [each.url for each in targets.resolve(f"{place}/set/").sets] == [f"{place}/set/train"]
    storage.write_json(f"{place}/mine/config.json", {})
    assert collect._runs_below(place) == {f"{place}/mine"}


def test_slurm_gets_its_output_file_literally(tmp_path: Path) -> None:
    spec = JobSpec("dalle", "mine", str(tmp_path / FOLDER), "gang", ClusterConfig())
    (output,) = [word for word in slurm_submit.sbatch(spec) if word.startswith("--output=")]
    assert output == f"--output={tmp_path}/[set] a*b? 100%%/logs/%x-%j.out"
    line = next(line for line in slurm_submit.shown(spec).splitlines() if "sbatch " in line)
    assert f"--output={tmp_path}/[set] a*b? 100%%/logs/%x-%j.out" in shlex.split(line), "and the line can be pasted"


def test_commands_in_messages_can_be_pasted() -> None:
    assert launcher("dalle", "runs/mine") == "launcher.py dalle runs/mine"
    assert shlex.split(launcher("dalle", "runs/it's [1]")) == ["launcher.py", "dalle", "runs/it's [1]"]
