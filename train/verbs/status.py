"""``launcher.py status RUN...``: where the stages of runs stand, live, queued or dead, as tables or JSON, once or again and again."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict
from typing import Any

from infra import shown, storage
from infra.errors import DataError, ReportedError
from infra.progress import duration, table, three_digits
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from train.config import RunConfig, load_run
from train.run import change_points, lineage
from train.run.stage_table import STAGES, TRAINED, used_by
from train.verbs import standing
from train.verbs.standing import Standing

_CLEAR = "\x1b[H\x1b[2J"
_LONGEST = 100
"""Characters of a row's last cell."""


def main(urls: list[str], *, as_json: bool = False, watch_s: float = 0.0, stop: StopFlag | None = None) -> None:
    """Print one row for each stage of a run, or one for each of several runs.

    Args:
        watch_s: seconds after which that is done again, until a stop signal comes; 0: it is done once.

    Raises:
        DataError: there is no run in a folder; the others are shown first.
    """
    while True:
        found, failed = [], list[ReportedError]()
        for url in urls:
            try:
                found.append(_read(url))
            except ReportedError as error:
                failed.append(error)
        if failed and not found:
            raise failed[0]
        if watch_s and sys.stdout.isatty():
            print(_CLEAR, end="")
        if as_json:
            print(json.dumps([_as_json(run, stages) for _, run, stages in found], allow_nan=False), flush=True)
        elif len(urls) == 1:
            _one(*found[0])
        else:
            table([_run_row(run, stages) for _, run, stages in found])
        for each in failed[: None if watch_s else -1]:
            print(each, file=sys.stderr)
        if not watch_s and failed:
            raise failed[-1]
        if not watch_s:
            return
        if _asleep(watch_s, stop):
            return


def _asleep(seconds: float, stop: StopFlag | None) -> bool:
    """Wait for the next look; whether a stop signal came."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if stop:
            return True
        time.sleep(min(0.2, seconds))
    return bool(stop)


def _read(url: str) -> tuple[RunConfig, RunFolder, list[Standing]]:
    run = RunFolder(url)
    if not storage.exists(run.config_url):
        raise DataError(f"{run.config_url} is missing: {url} is no run folder.")
    cfg = load_run(run.url, [])
    return cfg, run, [each for name in used_by(cfg) for each in standing.of_stage(cfg, run, name)]


def _one(cfg: RunConfig, run: RunFolder, stages: list[Standing]) -> None:
    table([_row(each) for each in stages], title=f"{run.url}   {time.strftime('%H:%M:%S')}")
    for each in stages:
        where = f"{each.stage} {each.share}".strip()
        if each.is_live and each.waits:
            print(shown.escaped(f"{where}: {each.waits}"))
        if each.is_live and each.slow:
            print(f"{where}: slow: {', '.join(f'rank {rank:.0f} ({times:.1f} times the median of own work)' for rank, times in each.slow)}")
        if each.end and each.state in ("ended", "killed"):
            print(shown.escaped(f"{where}: {each.end}"))
    for name in TRAINED:
        for point in change_points.read(run.at(name)):
            print(shown.escaped(f"{name}: {change_points.described(point)}"))
    for name in STAGES:
        if old := lineage.out_of_date(cfg, run, name):
            print(shown.escaped(f"{name}: out of date, {old}; {lineage.remedy(run, name)}"))


def _row(each: Standing) -> dict[str, object]:
    """For the table of one run."""
    now = each.waits if each.state in ("running", "starting", "queued", "not begun") else each.end
    return {
        "stage": each.stage if not each.share else f"  {each.share}",
        "state": each.state if not each.state.startswith("-") or not each.waits else f"waits {each.waits}",
        "updates": f"{each.done}/{each.total}{'' if each.unit == 'updates' else f' {each.unit}'}" if each.total else "",
        "loss": f"{each.loss:.4g}" if each.loss is not None else "",
        "speed": _speed(each),
        "ETA": _eta(each),
        "sign": _sign(each),
        "checkpoint": _checkpoint(each),
        "restarts": each.restarts or "",
        "minutes": f"{each.seconds / 60:.1f}" if each.seconds is not None else "",
        "now": now if len(now) <= _LONGEST else f"{now[: _LONGEST - 1]}…",
    }


def _run_row(run: RunFolder, stages: list[Standing]) -> dict[str, object]:
    """For the table of several runs: the stage that matters."""
    whole = [each for each in stages if not each.share]
    return {"run": run.url, **_row(_that_matters(whole))}


def _that_matters(stages: list[Standing]) -> Standing:
    """Of a run's stages, in their order, the first of those that most need a look: what runs, then what is to run, what failed, what is to be done once more;
    else the last of those that have finished, or the first of a run in which nothing was begun."""
    urgent = (("running",), ("starting", "queued", "not begun"), ("ended", "killed"), ("goes on", "out of date"))
    for states in urgent:
        for each in stages:
            if each.state in states:
                return each
    begun = [each for each in stages if each.state != "-"]
    return begun[-1] if begun else stages[0]


def _speed(each: Standing) -> str:
    if not each.rate or not each.is_live:
        return ""
    if each.rate_ago_s is not None:
        return f"{three_digits(each.rate)}/s, {duration(each.rate_ago_s)} ago"
    of_median = f" ({each.of_median:.0%} of its median)" if each.of_median is not None else ""
    return f"{three_digits(each.rate)}/s{of_median}"


def _eta(each: Standing) -> str:
    if each.eta_s is not None:
        return duration(each.eta_s)
    return "unknown" if each.is_live and each.rate_ago_s is not None else ""


def _sign(each: Standing) -> str:
    """The oldest last sign of a rank, and whose it is where it is old."""
    if not each.heard_s or not each.is_live:
        return ""
    rank = max(each.heard_s, key=lambda rank: each.heard_s[rank])
    age = f"{each.heard_s[rank]:.0f} s"
    return f"{age} (rank {rank})" if each.heard_s[rank] > standing.SILENT_S else age


def _checkpoint(each: Standing) -> str:
    if each.saved < 0:
        return ""
    ago = f", {duration(each.saved_ago_s)} ago" if each.saved_ago_s is not None and each.is_live else ""
    return f"{each.saved}{ago}"


def _as_json(run: RunFolder, stages: list[Standing]) -> dict[str, Any]:
    rows = []
    for each in stages:
        facts = asdict(each) | {"restarts": each.restarts}
        facts["heard_s"] = {str(rank): seconds for rank, seconds in each.heard_s.items()}
        rows.append({name: str(value) if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()})
    return {"run": run.url, "time": time.time(), "stages": rows}
