"""Which commit a tree is of: that of git, of an archive, or unknown. About 1 s."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from infra import repository
from tests.support.root import ROOT


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True).stdout.strip()


def found(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setattr(repository, "REPOSITORY", folder)
    monkeypatch.setattr(repository, "ARCHIVED", folder / "infra" / "commit.txt")
    repository.commit.cache_clear()
    try:
        return repository.commit()
    finally:
        repository.commit.cache_clear()


def test_a_checkout_an_archive_of_it_and_a_plain_copy_say_which_commit_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "infra").mkdir(parents=True)
    for name in (".gitattributes", "infra/commit.txt"):
        (here / name).write_bytes((ROOT / name).read_bytes())
    assert found(monkeypatch, here) == "unknown"
    git(here, "init", "-q")
    git(here, "add", ".")
    git(here, "commit", "-qm", "one")
    head = git(here, "rev-parse", "HEAD")
    assert found(monkeypatch, here) == head
    copy = here / "copy"  # below the checkout of something else
    copy.mkdir()
    git(here, "archive", "-o", str(tmp_path / "it.tar"), "HEAD")
    with tarfile.open(tmp_path / "it.tar") as archive:
        archive.extractall(copy, filter="data")
    assert found(monkeypatch, copy) == head
    git(here, "commit", "-q", "--allow-empty", "-m", "two")
    assert found(monkeypatch, copy) == head != git(here, "rev-parse", "HEAD")
    (here / "infra" / "commit.txt").write_text("changed\n")
    assert found(monkeypatch, here).endswith("+dirty")
    (copy / "infra" / "commit.txt").unlink()
    assert found(monkeypatch, copy) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert found(monkeypatch, here) == "unknown"
