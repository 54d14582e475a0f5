"""What is known of an attempt that ended, read from the run folder alone: records, signals, the node, last words, numerics, outages, what was lost."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass, field
from typing import Any

from infra import lease, ledger, listening, run_records, storage, stored
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from train.loop.goodput import lost_s
from train.loop.metrics import Point, read_metrics
from train.run.stage_table import STAGES

_NODE = re.compile(r"node \d+ \(([^)\s]+)\)")
_RANK = re.compile(r"\brank (\d+)\b")
_LOOKED_AT = 20
"""Points of a series before the end that numerics are judged by."""
_NO_ROOM = 2**20
"""Free bytes of a disk under which a record may have been lost for want of room."""
_BEFORE = 3
"""Earlier attempts of the same submission that are compared."""


@dataclass(frozen=True)
class Earlier:
    """An attempt before it, of the same submission."""

    code: int
    reason: str
    nodes: tuple[str, ...]
    """Nodes that its end points to."""
    saved: int


@dataclass(frozen=True)
class Facts:
    """Evidence of one attempt."""

    stage: str
    """The stage, or a share of one."""
    attempt: int
    code: int = ExitCode.CRASH
    reason: str = ""
    ended: bool = True
    """Whether it has ended at all."""
    signals: dict[int, str] = field(default_factory=dict)
    """Rank -> signal that ended its process."""
    names: dict[int, str] = field(default_factory=dict)
    """Rank -> its node."""
    memory_kills: dict[str, int] = field(default_factory=dict)
    """Node -> processes that its kernel killed for want of memory."""
    checks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Node -> what of it missed its floor afterwards."""
    words: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Rank -> the last lines that it printed."""
    stood: dict[int, str] = field(default_factory=dict)
    """Rank -> what it was at when it was last heard of."""
    numerics: tuple[str, ...] = ()
    """What was wrong with the numbers before the end."""
    outages: tuple[str, ...] = ()
    """Reasons that speak of the storage."""
    nodes: tuple[str, ...] = ()
    """Nodes that the end points to."""
    before: tuple[Earlier, ...] = ()
    """Newest last."""
    begun_at: int = -1
    """Updates in the checkpoint that it began with."""
    saved: int = -1
    """Updates in the newest checkpoint now."""
    done: int = -1
    """Updates that were made."""
    lost_s: float = 0.0
    trains: bool = True

    @property
    def lost_updates(self) -> int:
        """Updates that are made again."""
        return max(0, self.done - max(0, self.saved)) if self.trains and self.done >= 0 else 0

    @property
    def moved(self) -> bool:
        """Whether it saved a checkpoint of its own."""
        return self.saved > self.begun_at


def gather(run: RunFolder, label: str, attempt: int | None = None) -> Facts | None:
    """The evidence of an attempt, the newest if none is named; None where there was none.

    Raises:
        DataError: a record is damaged.
    """
    numbers = run.attempts(label)
    if not numbers:
        return None
    number = numbers[-1] if attempt is None else attempt
    stage = label.partition(".")[0]
    found = ledger.read_one(run, label, number)
    trains = STAGES[stage].trains
    files, live = _files(run, label, number), [node for _, node in listening.signs(run.url, label, number)]
    names = {int(rank["rank"]): str(node["name"]) for node in live for rank in node["ranks"]}
    signals: dict[int, str] = {}
    words: dict[int, tuple[str, ...]] = {}
    for file in files:
        signals |= {int(rank): str(name) for rank, name in file["signals"].items()}
        words |= {int(rank): tuple(lines) for rank, lines in file["words"].items()}
        names |= {int(rank): str(file["name"]) for rank in (*file["signals"], *file["words"])}
    reasons = [str(record["reason"]) for record in run.records(label, number) if record["code"] not in (ExitCode.DONE, ExitCode.REQUEUE)]
    newest = number == numbers[-1]
    saved = ledger.newest_checkpoint(run, stage) if trains else -1
    series = read_metrics(run.url, stage) if trains and newest else {}
    said = [int(rank.get("done", 0)) for node in live for rank in node["ranks"] if rank["rank"] == 0]
    return Facts(
        stage=label,
        attempt=number,
        code=found.code,
        reason=found.reason if found.closed else found.reason + _unwritten(run),
        ended=found.closed or is_over(run, label, newest=newest),
        signals=signals,
        names=names,
        memory_kills={str(file["name"]): int(file["out_of_memory_kills"]) for file in files if file.get("out_of_memory_kills")},
        checks={str(file["name"]): tuple(file["checks"]) for file in files if file.get("checks")},
        words=words,
        stood={int(rank["rank"]): _stood(rank) for node in live for rank in node["ranks"]},
        numerics=tuple(_numerics(series)),
        outages=tuple(dict.fromkeys(reason for reason in [found.reason, *reasons] if OUTAGE.search(reason))),
        nodes=_pointed_to(found.reason, signals, names),
        before=tuple(_earlier(run, label, numbers[: numbers.index(number)], found.restart)),
        begun_at=found.saved,
        saved=saved,
        done=max([point.step for point in series.get("train/loss", [])[-1:]] + said, default=-1) if trains else -1,
        lost_s=lost_s(run.url, stage, max(0, saved)) if trains and newest else 0.0,
        trains=trains,
    )


OUTAGE = re.compile(
    r"storage unreachable|failed after (at most )?\d+ attempts|failed after repeated attempts|the server answered|an answer came damaged|credentials have expired"
)
"""What reasons of an outage say (infra/s3_errors.py, infra/cloud_errors.py)."""


def is_over(run: RunFolder, label: str, *, newest: bool) -> bool:
    """Whether nobody works on an attempt whose end was not written down."""
    holder = lease.at_work(run.url, label)
    return not newest or holder is None or holder.begun > ledger.begun(run, label)  # a launcher that came later, and has begun no attempt yet


def _unwritten(run: RunFolder) -> str:
    """Why an end may not have been written down, where that can still be seen: on a full disk nothing says that it is full."""
    if storage.is_remote(run.url) or shutil.disk_usage(storage.local_path(run.url)).free >= _NO_ROOM:
        return ""
    return f"; or its record could not be written: there is no space left in {run.url}"


def _files(run: RunFolder, label: str, number: int) -> list[dict[str, Any]]:
    place = run.attempt_url(label, number)
    names = [name for name in storage.list_level(place) if name.startswith("evidence-")]
    return [{"signals": {}, "words": {}} | stored.read(storage.join(place, name), run_records.Evidence) for name in sorted(names)]


def _stood(rank: dict[str, Any]) -> str:
    at = f"{rank.get('done', 0)} of {rank['total']} {rank.get('unit') or ''}".rstrip() if rank.get("total") else ""
    doing = str(rank.get("phase") or "")
    state = "stopped (SIGSTOP)" if rank.get("state") in ("T", "t") else ""
    return ", ".join(word for word in (doing, at, state) if word) or "nothing said"


def _pointed_to(reason: str, signals: dict[int, str], names: dict[int, str]) -> tuple[str, ...]:
    """Nodes that a reason names, else those of the ranks that it names first, or that were killed."""
    if named := _NODE.findall(reason):
        return tuple(dict.fromkeys(named))
    rank = _RANK.search(reason)
    ranks = [int(rank[1])] if rank else list(signals)
    return tuple(dict.fromkeys(names[each] for each in ranks if each in names))


def _earlier(run: RunFolder, label: str, numbers: list[int], restart: int) -> list[Earlier]:
    """Attempts of the same submission before it, as far back as _BEFORE. Outside of a scheduler each start is a submission of its own, and counts as well: it
    is the same person's."""
    found: list[Earlier] = []
    for number in reversed(numbers[-_BEFORE:]):
        attempt = ledger.read_one(run, label, number)
        files = _files(run, label, number)
        names = {int(rank): str(file["name"]) for file in files for rank in (*file["signals"], *file["words"])}
        signals = {int(rank): str(name) for file in files for rank, name in file["signals"].items()}
        found.append(Earlier(attempt.code, attempt.reason, _pointed_to(attempt.reason, signals, names), attempt.saved))
        if attempt.run_id and attempt.restart == 0 and restart:
            break
    return found[::-1]


def _numerics(series: dict[str, list[Point]]) -> list[str]:
    """What of the last points is not as numbers of a healthy run are."""
    found, losses = [], series.get("train/loss", [])
    last = losses[-_LOOKED_AT:]
    if bad := [point.step for point in last if not math.isfinite(point.value)]:
        found.append(f"train/loss was not finite from update {bad[0]} on")
    good = [point.value for point in last if math.isfinite(point.value)]
    if len(good) > 4 and good[-1] - min(good) > 1.0 and good[-1] > 1.5 * abs(min(good)):
        found.append(f"train/loss rose from {min(good):.4g} to {good[-1]:.4g} over the last {len(last)} points")
    for name, what in (("numerics/forward_non_finite", "updates had non-finite losses"), ("numerics/gradient_overflow", "updates had overflows")):
        points = series.get(name, [])
        if points and losses and points[-1].step >= last[0].step:
            found.append(f"{points[-1].value:.0f} {what} so far, the last by update {points[-1].step}")
    norms = [point.value for point in series.get("optim/grad_norm", [])[-_LOOKED_AT:]]
    if norms and not math.isfinite(norms[-1]):
        found.append("the gradient's norm was not finite at the end")
    return found
