"""``launcher.py logs RUN``: what the ranks of an attempt printed, from the run folder, a SLURM job's output, or pods."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator

from infra import ledger, listening, queues, run_records, shown, storage, stored
from infra.errors import ConfigError, DataError, MissingError, UsageError
from infra.queues import Submitted
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from train.advice import facts
from train.run.stage_table import STAGES

_POLL_S = 0.5
_RESTART = re.compile(r"^== \w+: job \d+.*, restart (\d+), on ")
"""Begins the output of a job's start (infra/slurm/job.sh)."""


def main(url: str, stage: str, rank: int | None, attempt: int | None, *, follow: bool, stop: StopFlag) -> None:
    """Print it.

    Args:
        stage: or a share of one, as 'encode.0-of-3'; '' is the stage whose newest attempt began last.
        rank: None: all ranks.
        attempt: None: the newest.

    Raises:
        UsageError: there is no such stage or attempt.
        DataError: nothing was kept of it.
    """
    run = RunFolder(url)
    label = stage or newest(run)
    job = queues.of(run, label.partition(".")[0])
    numbers = run.attempts(label)
    if not numbers and job is None:
        raise UsageError(f"{url}: there was no attempt at '{label}'; attempts were made at {', '.join(labels(run)) or 'nothing'}.")
    chosen = numbers[-1] if attempt is None and numbers else attempt
    if attempt is not None and attempt not in numbers:
        raise UsageError(f"--attempt {attempt}: attempts at '{label}' are {', '.join(map(str, numbers)) or 'not there'}.")
    begin: dict[str, object] = {}
    if chosen is not None:
        begin = stored.read_if_there(run.attempt_url(label, chosen, "begin.json"), run_records.Begin) or {}
    if chosen is not None and not begin.get("job"):
        _of_folder(run, label, chosen, rank, int(str(begin.get("size", 1))), follow=follow, stop=stop)
        return
    if job is None:
        raise DataError(
            f"'{label}' ran as job {begin.get('job')}, which was not submitted by launcher.py: see scontrol show job (StdOut), kubectl logs, or where its launchers were started."
        )
    _of_job(run, job, label, rank, int(str(begin["restart"])) if "restart" in begin else None, follow=follow, stop=stop)


def labels(run: RunFolder) -> list[str]:
    """Stages and shares at which attempts were made."""
    return [name.rstrip("/") for name in storage.list_level(run.at("exits")) if name.partition(".")[0].rstrip("/") in STAGES]


def newest(run: RunFolder) -> str:
    """The stage or share whose newest attempt began last.

    Raises:
        UsageError: there was none.
    """
    begun = {label: ledger.begun(run, label) for label in labels(run)}
    if not begun:
        raise UsageError(f"{run.url}: no stage was begun; name one that is in a queue with --stage.")
    return max(begun, key=lambda label: begun[label])


def _of_folder(run: RunFolder, label: str, attempt: int, rank: int | None, size: int, *, follow: bool, stop: StopFlag) -> None:
    """
    Args:
        size: ranks of the attempt.
    """
    place = listening.logs(run.url, label, attempt)
    seen: dict[str, int] = {}
    while True:
        over, end = (False, False) if not follow else _is_over(run, label, attempt)
        last = not follow or over or bool(stop)
        for name in _files(place, label, attempt, rank, may_come=not last and (rank is None or rank < size)):
            start = seen.get(name, 0)
            text = _from(storage.join(place, name), start, to_the_end=last)
            seen[name] = start + len(text)
            prefix = f"[rank {name.removeprefix('rank-').removesuffix('.log')}] " if size > 1 and rank is None else ""
            for line in text.decode(errors="replace").splitlines():
                print(shown.escaped(f"{prefix}{line}"), flush=True)
        if last:
            if not any(seen.values()):  # an empty answer looks like a broken one
                others = ", ".join(name for name in labels(run) if name != label)
                who = "its ranks" if rank is None else f"rank {rank}"
                print(
                    f"'{label}', attempt {attempt}: {who} printed nothing{f'; --stage shows others: {others}' if others else ''}.",
                    file=sys.stderr,
                )
            elif over and not end:
                print(
                    f"'{label}', attempt {attempt}: nobody works on it any more, and no end was recorded: launcher.py why {run.url}", file=sys.stderr
                )
            return
        time.sleep(_POLL_S)


def _is_over(run: RunFolder, label: str, attempt: int) -> tuple[bool, bool]:
    """Whether an attempt is over, and whether its end was written down: that is asked last, because a launcher writes it before it gives up its lease."""
    left = facts.is_over(run, label, newest=attempt == run.attempts(label)[-1])
    end = storage.exists(run.attempt_url(label, attempt, "end.json"))
    return left or end, end


def _files(place: str, label: str, attempt: int, rank: int | None, *, may_come: bool) -> list[str]:
    """Names of the files that ranks' words are in, by rank.

    Args:
        may_come: whether there may be none yet: a rank makes its file when it begins.

    Raises:
        DataError: there are none.
    """
    of_all = sorted((name for name in storage.list_level(place) if name.endswith(".log")), key=lambda name: int(re.sub(r"\D", "", name) or 0))
    files = [name for name in of_all if rank is None or name == f"rank-{rank}.log"]
    if files or may_come:
        return files
    if rank is None or not of_all:
        raise DataError(f"{place}: holds no words of attempt {attempt} at '{label}'.")
    kept = ", ".join(re.sub(r"\D", "", name) for name in of_all)
    raise DataError(f"{place}: holds no words of rank {rank} of attempt {attempt} at '{label}', but of ranks {kept}.")


def _from(url: str, start: int, *, to_the_end: bool) -> bytes:
    """What a file holds from a byte on; whole lines only, unless nobody writes on: a process that was killed may leave half of one."""
    try:
        if storage.size(url) <= start:
            return b""
        with storage.open_stream(url, start) as file:
            data = file.read()
    except MissingError:
        return b""
    return data if to_the_end else data[: data.rfind(b"\n") + 1]


def _of_job(run: RunFolder, job: Submitted, label: str, rank: int | None, restart: int | None, *, follow: bool, stop: StopFlag) -> None:
    if job.scheduler == "k8s":  # of pods of earlier starts a cluster keeps nothing
        child = subprocess.Popen(queues.pods_log(job, follow=follow), stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if _is_of(line, rank):
                print(shown.escaped(line), end="", flush=True)
        if code := child.wait():
            raise ConfigError(f"kubectl logs of {job.words} ended with {code}.")
        return
    share = label.partition(".")[2].partition("-of-")[0]
    url = queues.output_file(job, run.url, int(share or 0))
    if not follow and not storage.exists(url):
        raise DataError(f"{url} is not there: {job.words} has not begun, or its output was moved.")
    at = 0
    for line in _lines(url, job, follow=follow, stop=stop):
        if found := _RESTART.match(line):
            at = int(found[1])
        if (restart is None or at == restart) and _is_of(line, rank):
            print(shown.escaped(line), flush=True)


def _lines(url: str, job: Submitted, *, follow: bool, stop: StopFlag) -> Iterator[str]:
    """The lines of a file, and with ``follow`` those to come, until its job is in no queue any more."""
    seen, look = 0, 0.0
    while True:
        last = not follow or bool(stop)
        if follow and time.monotonic() >= look:
            look = time.monotonic() + 20 * _POLL_S
            last |= queues.state(job) == ""
        text = _from(url, seen, to_the_end=last)
        seen += len(text)
        yield from text.decode(errors="replace").splitlines()
        if last:
            return
        time.sleep(_POLL_S)


def _is_of(line: str, rank: int | None) -> bool:
    """Whether a rank printed a line, as its launcher marks it."""
    return rank is None or f"[rank {rank}] " in line
