"""Every verb takes a run folder's name literally first, local and on S3: brackets, *, ?, spaces, % and a slash at the end. About 30 s."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

import launcher
from infra import storage
from infra.errors import ConfigError, ReportedError, UsageError
from infra.signals import STOP_SIGNALS, StopFlag
from tests.support.made_sets import png
from tests.support.published_vqgans import Published
from tests.support.root import ROOT
from tests.support.stopped_run import FIXTURE, run_stage
from tests.train.weights.test_released_dvae import released, write
from train import launch
from train.bench import harness, table
from train.config import load_run
from train.drawing.settings import Settings
from train.run import places
from train.run.stage_table import STAGES, used_by
from train.stages import prepare_preview
from train.verbs import (
    bench,
    cancel,
    collect,
    doctor,
    doctor_lineage,
    draw,
    export,
    import_dvae,
    inspect,
    logs,
    plan,
    play,
    status,
    takedown,
    tensorboard,
    validate,
    why,
)

FOLDER = "[set] a*b? 100%"
DECOY = "s aXb1 100%"
"""What the name means as a pattern."""


def _doctor(run: str, out: Path) -> None:
    cfg = load_run(run, [])
    doctor_lineage.checked(cfg, places.run_folder(cfg))
    assert all(finding.ok for finding in doctor.lineage(cfg, places.run_folder(cfg)))


def _draw(run: str, out: Path) -> None:
    options = draw.Options(Settings(n=1), out=f"{out}/{FOLDER}", device="cpu", precision="fp32")
    draw.main(run, ["a red fox [1] *?"], options, StopFlag())
    assert list((out / FOLDER).rglob("000.png"))


def _takedown(run: str, out: Path) -> None:
    (out / f"list {FOLDER}").write_text("nobody\n")
    takedown.main(run, [f"data.takedown={out}/list {FOLDER}"], dry_run=True)


def _play(run: str, out: Path) -> None:
    stop = StopFlag()
    stop.handle(STOP_SIGNALS[0], None)  # the page ends as soon as it is served
    play.main(run, "127.0.0.1", 0, "none", "cpu", "fp32", stop)


def _import(run: str, out: Path) -> None:
    """The files are read, and so is the run, whose dVAE has another shape than theirs."""
    (out / FOLDER).mkdir(exist_ok=True)
    encoder, decoder = (
        str(write(half, "zip", out / FOLDER / f"{name} [1].pkl")) for half, name in zip(released(), ("encoder", "decoder"), strict=True)
    )
    try:
        import_dvae.dvae(encoder, decoder, run, [], 1)
    except ConfigError as error:
        if "decoder [1].pkl hold a dVAE of another shape than this configuration; give dvae." not in str(error):
            raise


def _import_vqgan(run: str, out: Path) -> None:
    (out / FOLDER).mkdir(exist_ok=True)
    try:
        import_dvae.vqgan(Published("taming f8").write(out / FOLDER / "model [1].ckpt"), run, [], 1)
    except ConfigError as error:
        if "model [1].ckpt holds a dVAE of another shape than this configuration; give dvae." not in str(error):
            raise


VERBS: dict[str, Callable[[str, Path], object]] = {
    "status": lambda run, out: status.main([run]),
    "logs": lambda run, out: logs.main(run, "", None, None, follow=False, stop=StopFlag()),
    "tensorboard": lambda run, out: tensorboard.main([run], tensorboard.Options(f"{out}/{FOLDER}-copy", once=True), StopFlag()),
    "cancel": lambda run, out: cancel.main(run),
    "why": lambda run, out: why.main(run),
    "inspect": lambda run, out: inspect.main(run, inspect.Options(f"{out}/{FOLDER}.png", 8, 4, 0, "", "", "", "", False)),
    "validate": lambda run, out: validate.main(run, validate.Options("", "", "", 1, False, ""), StopFlag()),
    "collect": lambda run, out: collect.main(run, 7.0, [], delete=False),
    "takedown": _takedown,
    "plan": lambda run, out: plan.main(run, [], nodes=0, gpus=0, memory=0.0, gpu="H100-80GB", tokens=0.0, rank=0, price=0.0),
    "doctor": _doctor,
    "verdict": lambda run, out: launch.verdict("tokenizer", run, []),
    "export": lambda run, out: export.main(run, "dalle", "average", 0, f"{out}/{FOLDER}-export"),
    "draw": _draw,
    "play": _play,
    "import-dvae": _import,
    "import-vqgan": _import_vqgan,
    "export --package": lambda run, out: export.package(run, f"{out}/{FOLDER}-package"),
    "collect --runs": lambda run, out: collect.main(run, 7.0, [run.rpartition("/" + FOLDER)[0] or run], delete=False),
    "validate --run": lambda run, out: validate.main(run, validate.Options(run, run, "", 1, False, ""), StopFlag()),
    "report": lambda run, out: run_stage("report", [run]),
}
ELSEWHERE = {"bench", "docs", "demo", "sample", *STAGES} - {"report"}
"""Stages, which all read theirs as report does, and verbs that have tests of their own below."""


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    place = f"{tmp_path}/runs" if request.param == "local" else str(request.getfixturevalue("s3"))
    storage.upload_folder(FIXTURE / "run", f"{place}/{FOLDER}")
    storage.write_text(f"{place}/{DECOY}/config.json", "no configuration")
    storage.write_text(f"{place}/{DECOY}/provenance.json", "{}")
    return place


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_a_name_literally_first(verb: str, slash: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if slash and verb in ("draw", "play", "report", "export"):
        pytest.skip("the name is read as the others read it, and the work takes seconds")
    monkeypatch.chdir(tmp_path)
    try:
        VERBS[verb](f"{root}/{FOLDER}{slash}", tmp_path)
    except ReportedError as error:
        assert verb in ("verdict", "logs") and error.exit_code, error  # whatever it says, it says it of this folder
    with pytest.raises(ReportedError):
        VERBS[verb](f"{root}/{DECOY}x", tmp_path)


def test_every_verb_of_the_launcher_is_looked_at() -> None:
    commands = set(typer.main.get_command(launcher.app).commands)  # type: ignore[attr-defined]
    assert commands - ELSEWHERE == {verb.partition(" ")[0] for verb in VERBS}


def test_a_preset_file_is_taken_literally_and_the_commands_of_a_dry_run_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / f"{FOLDER}.toml"
    preset.write_text((ROOT / "train/presets/tiny.toml").read_text())
    (tmp_path / f"{DECOY}.toml").write_text("no preset")
    words = [f"run.root={tmp_path}/{FOLDER}", "run.name=mine", f"data.sources={tmp_path}/{FOLDER}/*.tar"]
    launch.stage("dvae", str(preset), words, on="local", nproc=2, dry_run=True, worker=False, stop=StopFlag())
    said = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in said if "launcher.py" in line and not line.startswith("#")]
    assert commands[0][1:] == [str(ROOT / "launcher.py"), "dvae", str(preset), *words, "--nproc", "2"]
    assert commands[1][2:] == ["dvae", f"{tmp_path}/{FOLDER}/mine/config.json", "--worker"]
    launch.demo(str(preset), words, on="local", nproc=1, dry_run=True, stop=StopFlag())
    said = capsys.readouterr().out.splitlines()
    commands = [shlex.split(line) for line in said if "launcher.py" in line and not line.startswith("#")]
    assert [command[2] for command in commands] == list(used_by(load_run("tiny", []))) and all(
        f"{tmp_path}/{FOLDER}/mine" in command[3] for command in commands
    )


@pytest.mark.parametrize("source", [f"{FOLDER}", f"{FOLDER}/", f"{FOLDER}/a [1] *.png"])
def test_raw_data_are_inspected_and_previewed_by_their_own_names(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, number in ((FOLDER, 3), (DECOY, 2)):
        (tmp_path / folder).mkdir()
        for each in range(number):
            name = "a [1] *" if each == 0 else f"{each} 100%?"
            (tmp_path / folder / f"{name}.png").write_bytes(png(each))
            (tmp_path / folder / f"{name}.txt").write_text(f"a picture of {number} dogs in the snow, the {each}th")
    place, count = f"{tmp_path}/{source}", 1 if source.endswith(".png") else 3
    inspect.main(place, inspect.Options(f"{tmp_path}/{FOLDER} sheet.png", 8, 4, 0, "", "", "", "", True))
    assert (tmp_path / f"{FOLDER} sheet.png").stat().st_size > 0
    said = prepare_preview.preview(load_run("tiny", [f'data.sources=["{place}"]', "data.min_side=8", "data.validation_share=0.5", "data.share=1"]))
    assert ("of a sample of 1 record 1 is kept" if count == 1 else f"of a sample of {count} records {count} are kept") in said, said


def test_figures_are_written_to_the_folder_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    written = list[Path]()

    def write_figures(result: str, folder: Path) -> Path:
        written.append(folder)
        return folder

    monkeypatch.setattr(table, "run", lambda name, options: name)
    monkeypatch.setattr(harness, "write", write_figures)
    bench.main("optimizer", f"{tmp_path}/{FOLDER}/", 0.1)
    assert written and {str(folder) for folder in written} == {f"{tmp_path}/{FOLDER}"}
    with pytest.raises(UsageError, match=r"--out s3://bucket/x: figures are written to a folder of this machine"):
        bench.main("optimizer", "s3://bucket/x", 0.1)
