"""How ``launcher.py draw`` treats whoever waits for it: what it says meanwhile, and what it does not say. Seconds: about 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import pytest

from infra.errors import DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support import drawable_run
from train.drawing import told
from train.drawing.settings import Settings
from train.verbs import draw as verb
from train.verbs.export import package

Draw = Callable[..., None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"))


@pytest.fixture
def draw(run: RunFolder, tmp_path: Path) -> Draw:
    def call(*captions: str, url: str = run.url, n: int = 1, seed: int = 0, batch: int = 0, **words: Any) -> None:
        settings = Settings() if "again" in words else Settings(n=n, seed=seed, batch=batch, window=1)
        verb.main(url, captions, verb.Options(settings, **({"out": str(tmp_path / "out")} | words)), StopFlag())

    return call


def drawings(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_pictures_of_two_drawings_drawn_again_lie_beside_each_other(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw("a red fox", "sea")
    for path in sorted((tmp_path / "out").rglob("samples.jsonl")):
        draw(url="", again=path.read_text(), out="")
    assert drawings(tmp_path / "again") == drawings(tmp_path / "out") and len(drawings(tmp_path / "out")) == 2


def test_words_given_without_quotes_are_noted(draw: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a", "red", "fox")
    assert "note: 3 captions of one word each; a caption of several words goes in quotes: 'a red fox'" in capsys.readouterr().err


def test_a_long_drawing_says_how_far_it_is_and_a_short_one_nothing(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw("a red fox", "sea", n=2, seed=1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(told, "PATIENCE_S", 0.0)
    draw("a red fox", "sea", n=2, seed=2, batch=2)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("draw  2/64 codes") and last.startswith("draw  64/64 codes") and "took" in last


def test_an_image_that_cannot_be_read_is_not_said_to_be_kept(draw: Draw, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "page.png").write_text("<html>")
    for name, message in (
        ("nowhere.png", "does not exist"),
        ("page.png", r"page\.png: image cannot be decoded .*; replace the file or leave it out\."),
    ):
        with pytest.raises(DataError, match=message):
            draw("a red fox", image=str(tmp_path / name))
    assert "rows of codes are kept" not in capsys.readouterr().out


def test_a_first_drawing_says_that_it_compiles(draw: Draw, capsys: pytest.CaptureFixture[str]) -> None:
    draw("a red fox")
    capsys.readouterr()
    numba.njit(lambda x: x + 1)(1)  # as if a kernel were not on disk
    numba.njit(lambda x: x + 2)(1)
    assert capsys.readouterr().out == "compiling the kernels of drawing for this machine: once, tens of seconds ...\n"


def test_a_package_is_described_as_its_run(draw: Draw, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package(run.url, str(tmp_path / "package"))
    for url in (run.url, str(tmp_path / "package")):
        draw("a red fox", url=url)
        assert f"{url}: average weights (" in capsys.readouterr().out
