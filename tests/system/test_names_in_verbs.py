"""Every verb takes a run folder's name literally first, local and on S3: brackets, *, ?, spaces, % and a slash at the end. About 30 s."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main

import launcher
from infra import storage
from infra.errors import ReportedError
from infra.signals import StopFlag
from tests.support.stopped_run import FIXTURE, run_stage
from train import launch
from train.config import load_run
from train.drawing.settings import Settings
from train.run import places
from train.run.stage_table import STAGES
from train.verbs import cancel, collect, doctor, doctor_lineage, draw, export, inspect, logs, plan, status, takedown, validate, why

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


VERBS: dict[str, Callable[[str, Path], object]] = {
    "status": lambda run, out: status.main([run]),
    "logs": lambda run, out: logs.main(run, "", None, None, follow=False, stop=StopFlag()),
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
    "report": lambda run, out: run_stage("report", [run]),
}
ELSEWHERE = {"import-dvae", "bench", "docs", "demo", "play", *STAGES} - {"report"}
"""Verbs that name no run folder, stages, which all read theirs as report does, and play, which opens a run as draw does and then serves it."""


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
    if slash and verb in ("draw", "report", "export"):
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
    assert commands - ELSEWHERE == set(VERBS)
