"""Section: time and throughput of every stage."""

from __future__ import annotations

from infra.progress import duration, three_digits
from train.report.markup import Child, el, join, note, table
from train.report.view import RunView, Section
from train.run.stage_table import STAGES


def section(run: RunView) -> Section | None:
    """One row for each stage, including unfinished ones."""
    seconds = {stage: float(run.done(stage).get("seconds") or 0) for stage in STAGES if run.done(stage)}
    if not seconds:
        return Section("timings", "Timings", note("No stage has finished yet."))
    longest = max(seconds.values()) or 1.0
    rows: list[list[Child]] = []
    for stage in run.stages:
        if stage == "report" and stage not in seconds:
            continue
        done = run.done(stage)
        if not done:
            rows.append([stage, el("span", "not finished", class_="quiet"), "", "", ""])
            continue
        width = 100 * seconds[stage] / longest
        bar = el("span", el("span", style=f"width:{width:.1f}%"), class_="bar")
        rows.append([stage, duration(seconds[stage]), bar, str(done.get("world_size", "")), _throughput(done)])
    rows.append([el("b", "together"), el("b", duration(sum(seconds.values()))), "", "", ""])
    aside = note("Time of work, as each stage says it in the terminal; starting its processes comes on top.")
    body = join(table(["stage", "time", "", "processes", "throughput"], rows, numbers=(1, 3, 4)), aside, _waiting(run), _commits(run))
    return Section("timings", "Timings", body)


def _throughput(done: dict[str, object]) -> str:
    found = done.get("throughput")
    if not isinstance(found, dict) or found.get("value") is None:
        return ""
    value = float(found["value"])
    return f"{three_digits(value) if value > 0 else 0} {found.get('unit', '')}"


def _waiting(run: RunView) -> Child:
    points = run.series("dvae").get("data/wait_s")
    if not points:
        return None
    return note(f"The dvae stage waited {1000 * sum(point.value for point in points) / len(points):.1f} ms for data in an average update.")


def _commits(run: RunView) -> Child:
    commits = {str(run.done(stage)["commit"]) for stage in STAGES if run.done(stage).get("commit")}
    if len(commits) < 2:
        return None
    return note(f"The stages ran on {len(commits)} different commits: {', '.join(sorted(commit[:10] for commit in commits))}.")
