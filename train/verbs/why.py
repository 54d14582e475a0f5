"""``launcher.py why RUN``: the evidence of the newest failed attempt, whether to start it again, by which rule, and what was lost. Who works is not judged."""

from __future__ import annotations

import json

from infra import shown, storage
from infra.commands import launcher
from infra.errors import DataError, ExitCode, UsageError
from infra.run_folder import RunFolder
from train.advice import facts, words
from train.verbs import logs


def main(url: str, stage: str = "", attempt: int | None = None, *, as_json: bool = False) -> None:
    """Print it.

    Args:
        stage: or a share of one; empty: those whose newest attempt did not end well, or else the one that was begun last.
        attempt: None: the newest.

    Raises:
        DataError: there is no run in this folder.
        UsageError: there was no such attempt.
    """
    run = RunFolder(url)
    if not storage.exists(run.config_url):
        raise DataError(f"{run.config_url} is missing: {url} is no run folder.")
    if stage and stage not in logs.labels(run):
        raise UsageError(f"{url}: there was no attempt at '{stage}'; attempts were made at {', '.join(logs.labels(run)) or 'nothing'}.")
    if attempt is not None and attempt not in run.attempts(stage or logs.newest(run)):
        raise UsageError(f"--attempt {attempt}: there was none at '{stage or logs.newest(run)}'.")
    labels = [stage or logs.newest(run)] if stage or attempt is not None else logs.labels(run)
    found = [each for label in labels if (each := facts.gather(run, label, attempt)) is not None]
    status = f"how it stands: {launcher('status', url)}"
    running = [each for each in found if not each.ended and not run.records(each.stage, each.attempt)]
    failed = [each for each in found if each not in running and (each.code != ExitCode.DONE or attempt is not None or stage)]
    if as_json:
        print(json.dumps([words.as_json(each) for each in failed]))
        return
    lines = [
        f"{each.stage}, attempt {each.attempt}: nothing has ended it; its launcher gave a sign of life within the last minute ({status})"
        for each in running
    ]
    print(shown.escaped("\n\n".join([*lines, *(words.of(each) for each in failed)])) or f"{url}: no attempt has failed.", flush=True)
