"""Where the stages of a run stand, by the files of its folder alone, and by the queue of a scheduler where one is here: live, queued, ended or killed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from infra import exit_records, lease, ledger, listening, live, queues, run_records, storage, stored
from infra.errors import DataError, ExitCode
from infra.queues import Submitted
from infra.run_folder import RunFolder
from train.config import FitSection, RunConfig
from train.loop.metrics import read_metrics
from train.run import lineage, places
from train.run.stage_table import STAGES, used_by

SILENT_S = 30.0
"""Seconds without a sign of a rank, and of a node beside what it takes to write, from which on that is said."""
STUCK_S = 60.0
"""Seconds without an update, or a multiple of the usual time of one, from which on that is said."""
_TIMES = 20
_START = ("the imports", "the start")
"""Phases of a rank before the work of its stage."""


@dataclass
class Standing:
    """Where a stage stands, or a share of one."""

    stage: str
    share: str = ""
    """'0/3'; empty: all of it."""
    state: str = "-"
    """'-', done, out of date, goes on, queued, not begun, starting, running, ended, killed; of shares together in words."""
    done: int = 0
    total: int = 0
    unit: str = ""
    loss: float | None = None
    rate: float = 0.0
    rate_ago_s: float | None = None
    """Seconds since the updates that ``rate`` is of, where none has come for longer than the attempt's pace explains."""
    of_median: float | None = None
    """Speed of the last updates over the median of the attempt's."""
    eta_s: float | None = None
    """None also where no updates come, and nothing says that they will."""
    skipped: int = 0
    heard_s: dict[int, float] = field(default_factory=dict)
    """Rank -> seconds since it last showed that it runs."""
    said_s: float | None = None
    """Seconds since rank 0 made an update, or said what it does in place of one."""
    slow: list[list[float]] = field(default_factory=list)
    saved: int = -1
    """Updates in the newest checkpoint."""
    saved_ago_s: float | None = None
    attempts: int = 0
    waits: str = ""
    """What it does in place of updates, or waits for."""
    end: str = ""
    """How its newest attempt ended."""
    seconds: float | None = None
    """Of a finished stage."""
    job: str = ""

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return max(0, self.attempts - 1)

    @property
    def is_live(self) -> bool:
        """Whether a launcher works on it."""
        return self.state == "running"


def of_stage(cfg: RunConfig, run: RunFolder, name: str) -> list[Standing]:
    """The stage, and below it its shares where its work is divided."""
    found = _alone(cfg, run, name)
    job = queues.of(run, name)
    shares = _shares(run, name)
    below = [_of_label(run, label, Standing(name, share)) for label, share in shares]
    if found.state in ("out of date", "goes on") and _is_taken_up_again(run, name, job):
        found.state, found.seconds = "-", None
    if found.state not in ("done", "out of date", "goes on"):
        _of_label(run, name, found)
        if below:
            _together(found, below, job)
        _of_queue(run, job, found, below)
        if found.state == "-":
            needs = [need for need in used_by(cfg)[name].needs if not places.finished(cfg, run, need)]
            found.waits = f"for {', '.join(needs)}" if needs else ""
    return [found, *(below if found.state != "done" else [])]


def _is_taken_up_again(run: RunFolder, name: str, job: Submitted | None) -> bool:
    """Whether a stage that has finished was begun or submitted since, to go on or to be made anew."""
    begun = max(ledger.begun(run, label) for label in _labels(run, name))
    holder = lease.at_work(run.url, name)
    return max(begun, holder.begun if holder is not None else 0.0, job.at if job is not None else 0.0) > float(
        (run.done(name) or {}).get("finished", 0.0)
    )


def _alone(cfg: RunConfig, run: RunFolder, name: str) -> Standing:
    found, marker = Standing(name), run.done(name)
    section: FitSection | None = getattr(cfg, f"{name}_fit", None)
    if section is not None:
        series = read_metrics(run.url, name)
        losses = series.get("train/loss", [])
        found.total, found.unit = section.steps, "updates"
        if losses:
            found.done, found.loss = losses[-1].step, losses[-1].value
        found.saved = ledger.newest_checkpoint(run, name)
        if found.saved >= 0:
            meta = run.at(name, "checkpoints", f"step-{found.saved:08d}", "meta.json")
            found.saved_ago_s = max(0.0, time.time() - storage.modified(meta))
    found.attempts = len(run.attempts(name))
    if marker is not None:
        old = bool(lineage.out_of_date(cfg, run, name))
        found.state = "goes on" if not places.finished(cfg, run, name) else "out of date" if old else "done"
        found.seconds = float(marker.get("seconds", 0.0))
    return found


def _shares(run: RunFolder, name: str) -> list[tuple[str, str]]:
    """Labels of a stage's shares, those of the newest division, each with 'i/n'."""
    if not STAGES[name].shared:
        return []
    found: list[tuple[int, int, str]] = []
    for entry in storage.list_level(run.at("exits")):
        stage, _, rest = entry.rstrip("/").partition(".")
        index, _, count = rest.partition("-of-")
        if stage == name and index.isdecimal() and count.isdecimal():
            found.append((int(index), int(count), entry.rstrip("/")))
    counts = {count for _, count, _ in found}
    if len(counts) > 1:  # divided anew: what began last counts
        newest = max(found, key=lambda each: ledger.begun(run, each[2]))[1]
        found = [each for each in found if each[1] == newest]
    return [(label, f"{index}/{count}") for index, count, label in sorted(found)]


def _labels(run: RunFolder, name: str) -> list[str]:
    """Under which the stage's attempts may stand: its own, and those of its shares."""
    return [name, *(label for label, _ in _shares(run, name))]


def _of_label(run: RunFolder, label: str, found: Standing) -> Standing:
    """What the newest attempt at a stage or share says."""
    numbers = run.attempts(label)
    found.attempts = len(numbers)
    begin = (stored.read_if_there(run.attempt_url(label, numbers[-1], "begin.json"), run_records.Begin) or {}) if numbers else {}
    begun, holder = float(begin.get("time", 0.0)), lease.at_work(run.url, label)
    if holder is not None and holder.begun > begun:
        found.state, found.waits = "starting", f"{_since(holder.begun)}: process {holder.pid} on {holder.node}"
        return found
    if not numbers:
        return found
    found.job = str(begin.get("job", ""))
    nodes = nodes_of(run, label, numbers[-1])
    # Rank 0 may be on any node: elastic orders nodes by their addresses.
    nobody: tuple[dict[str, Any], float] = ({}, 0.0)
    main, age_s = next(((rank, node["age_s"]) for node in nodes for rank in node["ranks"] if rank["rank"] == 0), nobody)
    if main:
        _of_main(main, age_s, found)
    ended = last_end(run, label, numbers[-1], int(begin.get("size", 1)))
    if ended is not None:
        code, reason = ended
        found.end = f"{ExitCode(code).name}: {reason}"
        found.state = "done" if code == ExitCode.DONE else "ended"
        found.eta_s, found.rate, found.rate_ago_s = None, 0.0, None
        return found
    if holder is None:
        found.state, found.eta_s, found.rate, found.rate_ago_s = "killed", None, 0.0, None
        sign = lease.last_sign(run.url, label)
        ago = f", whose last sign is {_seconds(sign[1])} old" if sign is not None else ""
        found.end = f"killed: no end was recorded by its launcher{ago}"
        return found
    found.state = "running"
    found.heard_s = {int(rank["rank"]): float(rank.get("heard_s", 0.0)) + node["age_s"] for node in nodes for rank in node["ranks"]}
    phase, wrong = str(main.get("phase", "")), trouble(nodes, found)
    starts = not main or (phase in _START and not main.get("title"))
    found.waits = wrong or (f"starting {_since(begun)}{f': {phase}' if phase else ''}" if starts else phase)
    if found.rate_ago_s is not None and (wrong or not phase):
        found.eta_s = None
    return found


def _since(begun: float) -> str:
    """When something began, and how long ago."""
    return f"since {time.strftime('%H:%M:%S', time.localtime(begun))} ({_seconds(max(0.0, time.time() - begun))})"


def nodes_of(run: RunFolder, label: str, attempt: int) -> list[dict[str, Any]]:
    """Signs of life of an attempt's nodes, node 0 first, each with the seconds since it was written ('age_s')."""
    found = []
    for url, node in listening.signs(run.url, label, attempt):
        with suppress(DataError):  # gone meanwhile: what is shown does without
            found.append(node | {"age_s": max(0.0, time.time() - storage.modified(url))})
    return found


def _of_main(rank: dict[str, Any], age_s: float, found: Standing) -> None:
    """Take over what rank 0 said: it is newer than its metrics, on S3 by as long as a save takes to come."""
    found.done, found.total = int(rank.get("done", found.done)), int(rank.get("total") or found.total)
    found.unit = "updates" if rank.get("unit") == "steps" else str(rank.get("unit") or found.unit)
    found.rate, found.eta_s = float(rank.get("rate") or 0.0), rank.get("eta_s")
    found.loss = rank.get("loss", found.loss)
    found.of_median, found.skipped, found.slow = rank.get("of_median"), int(rank.get("skipped", 0)), rank.get("slow") or []
    found.said_s = float(rank.get("said_s", 0.0)) + age_s
    found.rate_ago_s = live.quiet_s(rank, age_s)


def trouble(nodes: Sequence[dict[str, Any]], found: Standing) -> str:
    """What is wrong with a live attempt: ranks that are stopped, silent or gone, nodes that are silent, no update for long; '' where nothing is."""
    words = [
        f"node {node['node']} ({node['name']}) has given no sign for {_seconds(node['age_s'])}"
        for node in nodes
        if node["age_s"] > node.get("every_s", listening.EVERY_S) + SILENT_S
    ]
    for node in nodes:
        for rank in node["ranks"]:
            heard_s = float(rank.get("heard_s", 0.0)) + node["age_s"]
            name = f"rank {rank['rank']} (node {node['name']})"
            if rank.get("state") in ("T", "t"):
                words.append(f"{name} is stopped (SIGSTOP), for {_seconds(heard_s)}")
            elif not rank.get("state") and not node.get("ended"):
                words.append(f"{name} is gone")
            elif heard_s - node["age_s"] > SILENT_S:
                words.append(f"{name} has given no sign for {_seconds(heard_s)}")
    busy = any(rank.get("phase") for node in nodes for rank in node["ranks"])
    usual = _TIMES / found.rate if found.rate else 0.0
    if not words and not busy and found.said_s is not None and found.said_s > max(STUCK_S, usual):
        words.append(f"no update for {_seconds(found.said_s)}")
    return "; ".join(words)


def last_end(run: RunFolder, label: str, attempt: int, size: int) -> tuple[int, str] | None:
    """Code and reason of an attempt that has ended, by its end or its ranks' records; None while nothing says so."""
    end = stored.read_if_there(run.attempt_url(label, attempt, "end.json"), run_records.End)
    if end is not None:
        return int(end["code"]), str(end["reason"])
    records = run.records(label, attempt)
    return exit_records.root_cause(records, min(size, len(records))) if records else None


def _together(found: Standing, below: list[Standing], job: Submitted | None) -> None:
    """A stage whose work is divided, by its shares."""
    count = max(len(below), job.shares if job is not None else 1)
    counts = {state: sum(each.state == state for each in below) for state in ("starting", "running", "done", "ended", "killed")}
    words = [f"{number} {state}" for state, number in counts.items() if number]
    found.state = f"{', '.join(words)} of {max(count, _count(below))} shares"
    found.done, found.total = sum(each.done for each in below), sum(each.total for each in below)
    found.unit = next((each.unit for each in below if each.unit), "")
    found.rate = sum(each.rate for each in below if each.rate_ago_s is None)
    found.attempts = max(each.attempts for each in below)
    stopped = any(each.rate_ago_s is not None and each.eta_s is None for each in below)
    found.eta_s = None if stopped else max((each.eta_s for each in below if each.eta_s is not None), default=None)
    found.waits = "; ".join(f"share {each.share}: {each.waits}" for each in below if each.waits)


def _count(below: list[Standing]) -> int:
    return max(int(each.share.partition("/")[2]) for each in below)


def _of_queue(run: RunFolder, job: Submitted | None, found: Standing, below: list[Standing]) -> None:
    """What is known of a job that was submitted and has begun nothing yet, or waits to go on: one that saved, or crashed, goes back into its queue."""
    if job is None or any(each.is_live or each.state == "starting" for each in (found, *below)):
        return
    begun = max(ledger.begun(run, label) for label in _labels(run, found.stage))
    found.job, asked = job.job, queues.state(job)
    if begun >= job.at:
        if asked and (found.state in ("ended", "killed") or any(each.state in ("ended", "killed") for each in below)):
            found.state, found.waits = "queued", f"{job.words} ({asked}), to go on"
        return
    since = _seconds(max(0.0, time.time() - job.at))
    if asked == "":
        found.state, found.waits = "not begun", f"{job.words}, submitted {since} ago, is not in the queue any more"
    else:
        found.state = "starting" if asked and asked.startswith("RUNNING") else "queued"
        found.waits = f"{job.words} ({asked or 'its scheduler is not here to be asked'}), submitted {since} ago"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36_000 else f"{seconds / 3600:.0f} h"
