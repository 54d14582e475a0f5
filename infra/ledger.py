"""The ledger of attempts at a stage, and what follows from it: requeue, or stop (docs/contracts.md, section 1)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infra import exit_records, run_records, storage, stored
from infra.errors import DivergedError, ExitCode
from infra.run_folder import RunFolder

_STEP = re.compile(r"step-([0-9]{1,15})/")
_LOST = "lost.json"
_GO_ON = (ExitCode.CRASH, ExitCode.REQUEUE)
"""Ends after which a scheduler starts a job again."""
STOPS = 10
"""Starts in a row of a stage that trains, none of which moved a checkpoint: one more is not made, whether they were stopped or crashed. A machine that is
taken away again and again before the first update saves is none to train on, and a time limit that is used up by then would requeue for ever."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage, by the records in ``exits/<stage>/attempt-<number>``."""

    number: int
    run_id: str
    """Of the job's start that made it; empty outside a scheduler."""
    restart: int
    """Restarts of its job before it; 0 is a new submission."""
    code: int
    reason: str
    saved: int
    """Step of the newest checkpoint when it began; -1 for none."""
    closed: bool = False
    """Whether its end was written down."""
    ended: float = 0.0
    """When the last of its ranks did that crashed."""
    rendezvous: str = ""
    """Where its launchers met."""


@dataclass(frozen=True)
class Verdict:
    """What the scheduler should do: requeue on 75, end with any other code."""

    code: int
    reason: str


def newest_checkpoint(run: RunFolder, stage: str) -> int:
    """Step of a stage's newest complete checkpoint, -1 where there is none."""
    place = run.at(stage, "checkpoints")
    steps = sorted((int(found[1]) for name in storage.list_level(place) if (found := _STEP.fullmatch(name))), reverse=True)
    return next((step for step in steps if storage.exists(storage.join(place, f"step-{step:08d}", "meta.json"))), -1)


def read(run: RunFolder, stage: str) -> list[Attempt]:
    """All attempts at a stage, oldest first; one that left no record of an end was killed. For people: what decides reads ``newest_first``."""
    return list(newest_first(run, stage))[::-1]


def newest_first(run: RunFolder, stage: str) -> Iterator[Attempt]:
    """The attempts at a stage, each read when it is asked for: two small files of one whose end was written down."""
    return (read_one(run, stage, number) for number in reversed(run.attempts(stage)))


def decisive(run: RunFolder, stage: str, saved: int) -> list[Attempt]:
    """The newest attempts, oldest first, as far back as they can decide anything: to one that ended well, moved a checkpoint, or began a submission. For
    the holder of the lease, or a job script whose launchers have ended: what is read of ranks here is written down, and not read again.

    Args:
        saved: step of the newest checkpoint now.
    """
    found: list[Attempt] = []
    for attempt in newest_first(run, stage):
        if not attempt.closed:
            close(run, stage, attempt)
        found.append(attempt)
        if attempt.code not in _GO_ON or attempt.restart == 0 or (len(found) > 1 and attempt.saved < saved):
            break
        saved = attempt.saved
    return found[::-1]


def read_one(run: RunFolder, stage: str, number: int) -> Attempt:
    """One attempt, by what was written down of its end, else by the records of its ranks."""
    begin = stored.read_if_there(run.attempt_url(stage, number, "begin.json"), run_records.Begin) or {}
    end = stored.read_if_there(run.attempt_url(stage, number, "end.json"), run_records.End)
    closed, size = end is not None, int(begin.get("size", 1))
    if end is None:
        records = run.records(stage, number)
        code, reason = exit_records.root_cause(records, size)
        if code == ExitCode.CRASH and (lost := stored.read_if_there(run.attempt_url(stage, number, _LOST), run_records.Lost)):
            reason = f"{lost['reason']}; {reason}"
        end = ending(code, reason, records)
    known = {name: str(begin.get(name, "")) for name in ("run_id", "rendezvous")}
    restart, saved, ended = int(begin.get("restart", 0)), int(begin.get("saved", -1)), float(end.get("ended", 0.0))
    return Attempt(number, known["run_id"], restart, int(end["code"]), str(end["reason"]), saved, closed, ended, known["rendezvous"])


def ending(code: int, reason: str, records: Sequence[exit_records.Record]) -> dict[str, Any]:
    """What is written down of an attempt's end."""
    ended = max((float(record["time"]) for record in records if record["code"] == ExitCode.CRASH), default=0.0)
    return {"code": int(code), "reason": reason, "ended": ended}


def close(run: RunFolder, stage: str, attempt: Attempt) -> None:
    """Write down how an attempt ended, once all of its launchers have."""
    write_end(run, stage, attempt.number, {"code": attempt.code, "reason": attempt.reason, "ended": attempt.ended})


def write_end(run: RunFolder, stage: str, number: int, end: dict[str, Any]) -> None:
    """The same of what ``ending`` returned."""
    storage.write_json(run.attempt_url(stage, number, "end.json"), end)


def note_lost(run: RunFolder, stage: str, number: int, reason: str) -> None:
    """Keep what node 0 alone knows of nodes that gave no sign, while others may still record why they ended."""
    storage.write_json(run.attempt_url(stage, number, _LOST), {"reason": reason})


def crashes_in_a_row(attempts: list[Attempt], saved: int) -> int:
    """Newest attempts of one submission that crashed without saving a checkpoint between them; the newest crash counts in any case.

    Args:
        attempts: oldest first.
        saved: step of the newest checkpoint now.
    """
    count = 0
    for attempt in reversed(attempts):
        moved = attempt.saved < saved
        if attempt.code in (ExitCode.DONE, ExitCode.REQUEUE) or (count and moved):
            break
        count += 1
        saved = attempt.saved
        if moved or attempt.restart == 0:
            break
    return count


def idle_in_a_row(attempts: list[Attempt], saved: int) -> int:
    """Newest attempts of one submission that were to go on, by a stop or a crash, and moved no checkpoint.

    Args:
        attempts: oldest first.
        saved: step of the newest checkpoint now.
    """
    count = 0
    for attempt in reversed(attempts):
        if attempt.code not in _GO_ON or attempt.saved < saved:
            break
        count += 1
        saved = attempt.saved
        if attempt.restart == 0:
            break
    return count


def judge(attempts: list[Attempt], saved: int, retries: int, stops: int | None = None) -> Verdict:
    """What the scheduler should do after the newest attempt.

    A stop by signal is requeued, a code of its own stops, a crash is requeued until ``retries`` crashes in a row saved nothing; then it is 93. So it is
    once more than ``stops`` starts in a row moved no checkpoint, however they ended; None: of a stage that has none.
    """
    if not attempts:
        return Verdict(ExitCode.CRASH, "no attempt was begun: see the job's log")
    last = attempts[-1]
    if stops is not None and last.code in _GO_ON and (idle := idle_in_a_row(attempts, saved)) > stops:
        return Verdict(
            ExitCode.DIVERGED,
            f"{idle} starts in a row moved no checkpoint, the last: {last.reason}; the time limit or the machines leave no time for an update and a save",
        )
    if last.code != ExitCode.CRASH:
        return Verdict(last.code, last.reason)
    count = crashes_in_a_row(attempts, saved)
    if count > retries:
        return Verdict(ExitCode.DIVERGED, f"{count} crashes in a row without progress, the last: {last.reason}")
    return Verdict(ExitCode.REQUEUE, f"crash {count} in a row ({retries} are retried): {last.reason}")


def refuse_a_crash_loop(run: RunFolder, stage: str, restart: int, retries: int, stops: int | None = None) -> None:
    """Where the scheduler itself restarts (Kubernetes): do not begin again after too many crashes, or stops, in a row.

    Raises:
        DivergedError: the limit is passed; a new submission starts counting afresh.
    """
    if not restart:
        return
    saved = newest_checkpoint(run, stage)
    attempts = decisive(run, stage, saved)
    if attempts and attempts[-1].code in _GO_ON:
        verdict = judge(attempts, saved, retries, stops)
        if verdict.code == ExitCode.DIVERGED:
            raise DivergedError(f"{stage}: {verdict.reason}; not started again. See {run.at('exits', stage)}, and submit anew once it is mended.")
