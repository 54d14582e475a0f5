"""``launcher.py status RUN``: how far each stage of a run is, and how its attempts ended."""

from __future__ import annotations

from infra import storage
from infra.errors import DataError, ExitCode
from infra.progress import table
from infra.run_folder import RunFolder
from train.loop.metrics import read_metrics
from train.run.stage_table import STAGES


def main(url: str) -> None:
    """Print one row for each stage.

    Raises:
        DataError: there is no run in this folder.
    """
    run = RunFolder(url)
    if not storage.exists(run.config_url):
        raise DataError(f"{run.config_url} is missing: {url} is no run folder.")
    run.check_schema()
    config = storage.read_json(run.config_url)
    table([_row(run, config, name) for name in STAGES], title=url)


def _row(run: RunFolder, config: dict[str, dict[str, object]], name: str) -> dict[str, object]:
    done = run.done(name)
    attempts = sorted({int(file.split("/")[0].removeprefix("attempt-")) for file in storage.list_files(run.at("exits", name))})
    section = config.get(f"{name}_fit")
    steps = ""
    if section is not None:
        series = read_metrics(run.url, name).get("train/loss", [])
        steps = f"{series[-1].step if series else 0}/{section['steps']}"
    return {
        "stage": name,
        "state": "done" if done else ("begun" if attempts else "-"),
        "steps": steps,
        "minutes": f"{done['seconds'] / 60:.1f}" if done else "",
        "attempts": len(attempts) or "",
        "last end": _last_end(run, name, attempts[-1]) if attempts and not done else "",
    }


def _last_end(run: RunFolder, name: str, attempt: int) -> str:
    base = run.at("exits", name, f"attempt-{attempt}")
    ranks = len([file for file in storage.list_files(base) if file.startswith("rank-")])
    code, reason = run.root_cause(name, attempt, ranks)
    return f"{ExitCode(code).name}: {reason}"[:100] if ranks else "running, or killed"
