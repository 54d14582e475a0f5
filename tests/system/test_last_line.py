"""One useful line, last: what a person reads after a mistake of theirs, and that no traceback stands above it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import launcher
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support import drawable_run
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from tests.support.stopped_run import FIXTURE
from train.launch import StageFailed, _run_child

_UNKNOWN = "odd,strange\n1,2\n3,4\n"
_NAMELESS = "image,caption\na.png,\nb.png,\n"


@pytest.fixture(autouse=True)
def stop(monkeypatch: pytest.MonkeyPatch) -> StopFlag:
    """What launcher.py has as a program."""
    flag = StopFlag()
    monkeypatch.setattr(launcher, "STOP", flag, raising=False)
    return flag


def last_line(capfd: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code of a command line and the last line that it says; nothing may look like a traceback."""
    code = launcher.main(list(words))
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err and 'File "' not in said.out + said.err, said.err
    return code, said.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "run.name=2026-11-29",
            "  run.name: 2026-11-29 is read as a date or a time, which no key accepts; write 'run.name=\"2026-11-29\"' for text.",
        ),
        ("run.name=1_1_1", "  run.name: Input should be a valid string; given: 1_1_1 (read as 111); write 'run.name=\"1_1_1\"' for text."),
        ("run.name=0x10", "  run.name: Input should be a valid string; given: 0x10 (read as 16); write 'run.name=\"0x10\"' for text."),
        ("run.seed=1e3", "  run.seed: Input should be a valid integer; given: 1e3 (read as 1000.0)."),
        ("dvae_fit.lr=inf", "  dvae_fit.lr: Input should be a finite number; given: inf."),
    ],
)
def test_a_value_is_quoted_as_it_was_typed_with_the_way_to_write_it(capfd: pytest.CaptureFixture[str], word: str, line: str) -> None:
    assert last_line(capfd, "dvae", "tiny", word, "--dry-run") == (ExitCode.CONFIG, line)


def test_what_quoting_advises_is_taken_as_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["dvae", "tiny", 'run.name="2026-11-29"', "--dry-run"]) == 0
    assert 'name = "2026-11-29"' in capfd.readouterr().out


def test_a_preset_that_is_no_text_is_a_configuration_error(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"[run]\n# caf\xe9\n")
    code, line = last_line(capfd, "dvae", str(tmp_path / "mine.toml"))
    assert code == ExitCode.CONFIG and line.endswith("mine.toml: not UTF-8 text (invalid continuation byte at byte 11); save it as UTF-8.")


@pytest.mark.parametrize(
    ("table", "ending"),
    [
        (_UNKNOWN, "none of the 1 input shards could be read. The first, pairs.csv@0: "),
        (_NAMELESS, "Name the columns or keys of captions in data.sources as captions"),
    ],
    ids=["unknown columns", "empty captions"],
)
def test_prepare_names_the_cause_and_tries_once_what_cannot_change(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path, table: str, ending: str
) -> None:
    (tmp_path / "pairs.csv").write_text(table)
    code, line = last_line(capfd, "prepare", "tiny", f"run.root={tmp_path}/runs", f'data.sources=["{tmp_path}/pairs.csv"]', "--nproc", "1")
    assert code == ExitCode.DATA and line.startswith("data error: prepare: rank 0: ") and ending in line and "min_side" not in line
    assert "odd, strange" in line or table == _NAMELESS, "the header is shown"
    assert "try 1 of" not in caplog.text and "try 2" not in caplog.text


@pytest.mark.parametrize(
    ("source", "word", "ending"),
    [
        (
            ', split="train"',
            "data.min_side=1",
            'data.sources says split = "train" of them: leave it out, or name a source with split = "validation".',
        ),
        (', split="hash"', "data.min_side=90", "Add larger images, or lower data.min_side (for example train/metadata.csv/@"),
        (', split="hash"', 'filters.languages=["ru"]', "filters.languages"),
    ],
    ids=["all called train", "too small", "another language"],
)
def test_an_empty_split_names_its_own_cause(capfd: pytest.CaptureFixture[str], tmp_path: Path, source: str, word: str, ending: str) -> None:
    place = tmp_path / "set" / "train"
    place.mkdir(parents=True)
    for number in range(12):
        Image.new("RGB", (20, 20), (number * 20, 9, 99)).save(place / f"{number}.png")
    words = "a picture of the red house at the sea"
    (place / "metadata.csv").write_text("file_name,text\n" + "".join(f"{number}.png,{words} {number}\n" for number in range(12)))
    sources = f'data.sources=[{{url="{tmp_path}/set"{source}}}]'
    code, line = last_line(capfd, "prepare", "tiny", f"run.root={tmp_path}/runs", sources, "data.share=1", "data.min_side=1", word, "--nproc", "1")
    assert code == ExitCode.DATA and "no record in the" in line and ending in line, line
    assert ("min_side" in line) == ("min_side" in ending)


def spoilt(run: Path, stage: str) -> str:
    """Make the main rank's own work fail where the others wait for it in a collective; what its line must name."""
    if stage == "dalle":
        (run / "dalle" / "halve_at.json").write_text('"soon"')
        return "halve_at.json holds 'soon'; expected a list of updates after which to halve the step size"
    if stage == "encode":  # its parts are there, and are merged
        (run / "encode" / "done.json").unlink()
        versions = run / "codes" / "crop-0" / "train" / "versions"
        shutil.rmtree(versions)
        versions.write_text("in the way")
        return "versions"
    name = {"evaluate": "evaluate/metrics.json", "generate": "generate/grid.png"}[stage]
    (run / name).unlink(missing_ok=True)
    (run / name / "in-the-way").mkdir(parents=True)
    return name


@pytest.mark.parametrize(
    "stage", ["dalle", "evaluate", pytest.param("encode", marks=pytest.mark.soak), pytest.param("generate", marks=pytest.mark.soak)]
)
def test_work_of_the_main_rank_that_fails_is_the_only_thing_said(tmp_path: Path, stage: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "run", run)
    if stage in ("evaluate", "generate"):
        drawable_run.finish(RunFolder(str(run)))
    named = spoilt(run, stage)
    words = [sys.executable, str(ROOT / "launcher.py"), stage, str(run), "--nproc", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (ExitCode.CONFIG, ExitCode.DATA, ExitCode.CRASH) and "Traceback" not in done.stderr, done.stderr
    assert "peer" not in done.stderr.lower() and f"{stage}: rank 0: " in line and named in line, done.stderr


def test_a_stop_is_a_sentence_for_a_person_at_a_keyboard(capfd: pytest.CaptureFixture[str], tmp_path: Path, stop: StopFlag) -> None:
    stop.received = signal.SIGINT
    found = last_line(capfd, "prepare", "tiny", f"run.root={tmp_path}", "--nproc", "1")
    assert found == (ExitCode.REQUEUE, "stopped: SIGINT before the start; nothing was begun. Run the same command again to go on.")


def test_a_rank_whose_peer_left_with_a_reason_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(_NAMELESS)
    words = ["prepare", "tiny", f"run.root={tmp_path}/runs", f'data.sources=["{tmp_path}/pairs.csv"]', "--nproc", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher.py"), *words], capture_output=True, text=True, env=os.environ, timeout=PATIENCE_S, check=False
    )
    said = done.stderr.replace(str(tmp_path), "")
    assert done.returncode == ExitCode.DATA and "Traceback" not in said and "peer" not in said, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("data error: prepare: rank 0: data.sources") and "Name the columns" in line


def test_a_demo_adds_no_line_to_that_of_its_stage(tmp_path: Path) -> None:
    (tmp_path / "stage.py").write_text("import sys\nprint('data error: why', file=sys.stderr)\nsys.exit(65)\n")
    with pytest.raises(StageFailed) as failed:
        _run_child([sys.executable, str(tmp_path / "stage.py"), "prepare"], StopFlag())
    assert failed.value.exit_code == ExitCode.DATA and str(failed.value) == ""
