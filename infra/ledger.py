"""The ledger of attempts at a stage, and what follows from it: requeue, or stop (docs/contracts.md, section 1)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from infra import run_records, storage, stored
from infra.errors import DivergedError, ExitCode
from infra.run_folder import RunFolder

_ATTEMPT = re.compile(r"attempt-([0-9]{1,9})/")
_SAVED = re.compile(r"step-([0-9]{1,15})/meta\.json")


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


@dataclass(frozen=True)
class Verdict:
    """What the scheduler should do: requeue on 75, end with any other code."""

    code: int
    reason: str


def newest_checkpoint(run: RunFolder, stage: str) -> int:
    """Step of a stage's newest complete checkpoint, -1 where there is none."""
    names = storage.list_files(run.at(stage, "checkpoints"))
    return max((int(found[1]) for name in names if (found := _SAVED.fullmatch(name))), default=-1)


def read(run: RunFolder, stage: str) -> list[Attempt]:
    """All attempts at a stage, oldest first; one that left no record of an end was killed. Ends are kept in end.json, so that each is found once."""
    names = storage.list_files(run.at("exits", stage))
    return [_read_one(run, stage, number, names) for number in _numbers(names)]


def recent(run: RunFolder, stage: str) -> list[Attempt]:
    """The newest attempts, oldest first, back to one that was no crash or that began a submission: what decides. For the holder of the lease, before it
    begins: all launchers of earlier attempts have ended, or have lost, so what is read of their ranks here is written down, and not read again."""
    names = storage.list_files(run.at("exits", stage))
    known, found = set(names), []
    for number in reversed(_numbers(names)):
        attempt = _read_one(run, stage, number, names)
        if f"attempt-{number}/end.json" not in known:
            close(run, stage, attempt)
        found.append(attempt)
        if attempt.code != ExitCode.CRASH or attempt.restart == 0:
            break
    return found[::-1]


def _numbers(names: list[str]) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := _ATTEMPT.match(name))})


def _read_one(run: RunFolder, stage: str, number: int, names: list[str]) -> Attempt:
    base, folder = run.at("exits", stage), f"attempt-{number}"
    begin = stored.read(storage.join(base, folder, "begin.json"), run_records.Begin) if f"{folder}/begin.json" in names else {}
    if f"{folder}/end.json" in names:
        end = stored.read(storage.join(base, folder, "end.json"), run_records.End)
        code, reason = int(end["code"]), str(end["reason"])
    else:
        code, reason = run.root_cause(stage, number, int(begin.get("size", 1)))
    return Attempt(number, str(begin.get("run_id", "")), int(begin.get("restart", 0)), code, reason, int(begin.get("saved", -1)))


def close(run: RunFolder, stage: str, attempt: Attempt) -> None:
    """Write down how an attempt ended, once all of its launchers have."""
    storage.write_json(run.at("exits", stage, f"attempt-{attempt.number}", "end.json"), {"code": attempt.code, "reason": attempt.reason})


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


def judge(attempts: list[Attempt], saved: int, retries: int) -> Verdict:
    """What the scheduler should do after the newest attempt.

    A stop by signal is requeued, a code of its own stops, a crash is requeued until ``retries`` crashes in a row saved nothing; then it is 93.
    """
    if not attempts:
        return Verdict(ExitCode.CRASH, "no attempt was begun: see the job's log")
    last = attempts[-1]
    if last.code != ExitCode.CRASH:
        return Verdict(last.code, last.reason)
    count = crashes_in_a_row(attempts, saved)
    if count > retries:
        return Verdict(ExitCode.DIVERGED, f"{count} crashes in a row without progress, the last: {last.reason}")
    return Verdict(ExitCode.REQUEUE, f"crash {count} in a row ({retries} are retried): {last.reason}")


def refuse_a_crash_loop(run: RunFolder, stage: str, restart: int, retries: int) -> None:
    """Where the scheduler itself restarts (Kubernetes): do not begin again after too many crashes in a row.

    Raises:
        DivergedError: the limit is passed; a new submission starts counting afresh.
    """
    if not restart:
        return
    attempts = recent(run, stage)
    if attempts:
        verdict = judge(attempts, newest_checkpoint(run, stage), retries)
        if verdict.code == ExitCode.DIVERGED and attempts[-1].code == ExitCode.CRASH:
            raise DivergedError(f"{stage}: {verdict.reason}; not started again. See {run.at('exits', stage)}, and submit anew once it is mended.")
