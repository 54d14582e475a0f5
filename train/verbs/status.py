"""``launcher.py status RUN``: how far each stage of a run is, and how its attempts ended."""

from __future__ import annotations

from infra import exit_records, storage, stored
from infra.commands import launcher
from infra.errors import DataError, ExitCode
from infra.progress import table
from infra.run_folder import RunFolder
from infra.run_records import End
from train.config import FitSection, RunConfig, load_run
from train.loop.metrics import read_metrics
from train.run import change_points, lineage, places
from train.run.stage_table import STAGES, TRAINED


def main(url: str) -> None:
    """Print one row for each stage.

    Raises:
        DataError: there is no run in this folder.
    """
    run = RunFolder(url)
    if not storage.exists(run.config_url):
        raise DataError(f"{run.config_url} is missing: {url} is no run folder.")
    cfg = load_run(run.url, [])
    table([_row(cfg, run, name) for name in STAGES], title=url)
    for name in TRAINED:
        for point in change_points.read(run.at(name)):
            print(f"{name}: {change_points.described(point)}")
    for name in STAGES:
        if old := lineage.out_of_date(cfg, run, name):
            print(f"{name}: out of date, {old}; {_remedy(run, name)}")


def _remedy(run: RunFolder, name: str) -> str:
    """The command that brings a stage up to date with the weights that it uses."""
    command = launcher(name, run.url)
    return f"delete {run.at(name)} and run '{command}'" if STAGES[name].trains else f"run '{command}'"


def _state(cfg: RunConfig, run: RunFolder, name: str, begun: bool) -> str:
    if run.done(name) is None:
        return "begun" if begun else "-"
    if not places.finished(cfg, run, name):
        return "goes on"
    return "out of date" if lineage.out_of_date(cfg, run, name) else "done"


def _row(cfg: RunConfig, run: RunFolder, name: str) -> dict[str, object]:
    done = run.done(name)
    attempts = run.attempts(name)
    section: FitSection | None = getattr(cfg, f"{name}_fit", None)
    steps = ""
    if section is not None:
        series = read_metrics(run.url, name).get("train/loss", [])
        steps = f"{series[-1].step if series else 0}/{section.steps}"
    return {
        "stage": name,
        "state": _state(cfg, run, name, bool(attempts)),
        "steps": steps,
        "minutes": f"{done.get('seconds', 0.0) / 60:.1f}" if done else "",
        "attempts": len(attempts) or "",
        "last end": _last_end(run, name, attempts[-1]) if attempts and not done else "",
    }


def _last_end(run: RunFolder, name: str, attempt: int) -> str:
    end = stored.read_if_there(run.attempt_url(name, attempt, "end.json"), End)
    records = [] if end is not None else run.records(name, attempt)
    if end is None and not records:
        return "running, or killed"
    code, reason = exit_records.root_cause(records, len(records)) if end is None else (end["code"], end["reason"])
    return f"{ExitCode(code).name}: {reason}"[:100]
