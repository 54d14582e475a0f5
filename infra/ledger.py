"""The ledger of attempts at a stage, and the decision that follows from it: requeue or stop (docs/contracts.md, section 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infra import checkpoint_folders, exit_records, run_records, storage, stored
from infra.errors import DivergedError, ExitCode
from infra.run_folder import RunFolder

_LOST = "lost.json"
_GO_ON = (ExitCode.CRASH, ExitCode.REQUEUE)
"""Ends after which a scheduler starts a job again."""
STOPS = 10
"""A training stage may be started this many times in a row without a new checkpoint, whether the starts were stopped or crashed; then it is given up. A machine
that is preempted before every first save is of no use for training, and a time limit that ends before it would requeue the job for ever."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage, as recorded in ``exits/<stage>/attempt-<number>``."""

    number: int
    run_id: str
    """``Job.run_id`` of the start that made the attempt; empty without a scheduler."""
    restart: int
    """Restarts of its job before it; 0 is a new submission."""
    code: int
    reason: str
    saved: int
    """Step of the newest checkpoint when it began; -1 for none."""
    closed: bool = False
    """Whether its end was written down."""
    ended: float = 0.0
    """When the last of its crashed ranks ended; 0 if none crashed."""
    rendezvous: str = ""
    """host:port where its launchers met."""
    begun: float = 0.0
    """When it began; 0 if its begin.json is missing."""


@dataclass(frozen=True)
class Verdict:
    """What the scheduler should do: requeue if the code is 75, end the job on any other."""

    code: int
    reason: str


def newest_checkpoint(run: RunFolder, stage: str) -> int:
    """Step of a stage's newest complete checkpoint, -1 where there is none."""
    return next(checkpoint_folders.complete(run.at(stage)), -1)


def begun(run: RunFolder, label: str) -> float:
    """When the newest attempt at a stage or share began; 0 where there was none."""
    numbers = run.attempts(label)
    begin = stored.read_if_there(run.attempt_url(label, numbers[-1], "begin.json"), run_records.Begin) if numbers else None
    return float((begin or {}).get("time", 0.0))


def read(run: RunFolder, stage: str) -> list[Attempt]:
    """All attempts at a stage, oldest first; an attempt without an end record was killed. For display: decisions read ``newest_first``, which is cheaper."""
    return list(newest_first(run, stage))[::-1]


def newest_first(run: RunFolder, stage: str) -> Iterator[Attempt]:
    """The attempts at a stage, each read only when it is asked for. An attempt whose end was written down takes two small files."""
    return (read_one(run, stage, number) for number in reversed(run.attempts(stage)))


def decisive(run: RunFolder, stage: str, saved: int) -> list[Attempt]:
    """The newest attempts, oldest first, back to the last one that matters to a decision: one that ended with a code that stops, moved a checkpoint, or was a new
    submission.

    It writes down the end of attempts that lack one, so that the ranks' records are read only once. Hence only the holder of the lease may call it, or a job
    script whose launchers have ended.

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
    """One attempt: its end as it was written down, else as it follows from the records of its ranks."""
    begin = stored.read_if_there(run.attempt_url(stage, number, "begin.json"), run_records.Begin) or {}
    end = stored.read_if_there(run.attempt_url(stage, number, "end.json"), run_records.End)
    closed, size = end is not None, int(begin.get("size", 1))
    if end is None:
        records = run.records(stage, number)
        code, reason = exit_records.root_cause(records, size)
        if code == ExitCode.CRASH and (lost := stored.read_if_there(run.attempt_url(stage, number, _LOST), run_records.Lost)):
            reason = f"{lost['reason']}; {reason}"
        elif code == ExitCode.CRASH and not records:  # ranks die with their launcher, which would have written an end
            reason = f"{reason}, or its launcher was"
        end = ending(code, reason, records)
    known = {name: str(begin.get(name, "")) for name in ("run_id", "rendezvous")}
    restart, saved, begun, ended = (
        int(begin.get("restart", 0)),
        int(begin.get("saved", -1)),
        float(begin.get("time", 0.0)),
        float(end.get("ended", 0.0)),
    )
    return Attempt(number, known["run_id"], restart, int(end["code"]), str(end["reason"]), saved, closed, ended, known["rendezvous"], begun)


def ending(code: int, reason: str, records: Sequence[exit_records.Record]) -> dict[str, Any]:
    """The content of end.json."""
    ended = max((float(record["time"]) for record in records if record["code"] == ExitCode.CRASH), default=0.0)
    return {"code": int(code), "reason": reason, "ended": ended}


def close(run: RunFolder, stage: str, attempt: Attempt) -> None:
    """Write down how an attempt ended, once all of its launchers have."""
    write_end(run, stage, attempt.number, {"code": attempt.code, "reason": attempt.reason, "ended": attempt.ended})


def write_end(run: RunFolder, stage: str, number: int, end: dict[str, Any]) -> None:
    """Write end.json, with what ``ending`` returned."""
    storage.write_json(run.attempt_url(stage, number, "end.json"), end)


def note_lost(run: RunFolder, stage: str, number: int, reason: str) -> None:
    """Write lost.json: only node 0 knows which nodes went silent, and other nodes may still have to record why they ended."""
    storage.write_json(run.attempt_url(stage, number, _LOST), {"reason": reason})


def crashes_in_a_row(attempts: list[Attempt], saved: int) -> int:
    """How many of one submission's newest attempts crashed in a row without saving a checkpoint in between; the newest crash counts in any case.

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
    """How many of one submission's newest attempts in a row were stopped or crashed without saving a new checkpoint.

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

    A stop by a signal is requeued; 64, 65, 78 and 93 end the job; a crash is requeued until more than ``retries`` crashes in a row saved nothing, and then ends
    the job with 93. So do more than ``stops`` starts in a row without a new checkpoint, however they ended (None: the stage writes no checkpoints).
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
    """Refuse to begin after too many crashes or stops in a row. Needed where the scheduler itself restarts launchers (Kubernetes).

    Raises:
        DivergedError: there were too many; a new submission starts counting afresh.
    """
    if not restart:
        return
    saved = newest_checkpoint(run, stage)
    attempts = decisive(run, stage, saved)
    if attempts and attempts[-1].code in _GO_ON:
        verdict = judge(attempts, saved, retries, stops)
        if verdict.code == ExitCode.DIVERGED:
            raise DivergedError(
                f"{stage}: {verdict.reason}; not started again. See {run.at('exits', stage)}, and submit it again once the cause is removed."
            )
