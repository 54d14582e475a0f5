"""``launcher.py cancel RUN``: end what works on a run, or waits in a queue to; what trains saves first."""

from __future__ import annotations

import os
import signal

from infra import lease, queues, storage
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from train.run.stage_table import STAGES


def main(url: str, stage: str = "") -> None:
    """Tell launchers of this machine to stop, and schedulers to end their jobs.

    Args:
        stage: only this one; empty: all.

    Raises:
        DataError: there is no run in this folder.
        ConfigError: something works on it that cannot be reached from here; what can be was ended.
    """
    run = RunFolder(url)
    if not storage.exists(run.config_url):
        raise DataError(f"{run.config_url} is missing: {url} is no run folder.")
    said: list[str] = []
    out_of_reach: list[str] = []
    for name in [stage] if stage else list(STAGES):
        job = queues.of(run, name)
        if job is not None and queues.state(job) != "":
            over = queues.cancel(job) == queues.OVER
            said.append(f"{name}: {job.words} " + (queues.OVER if over else "was told to end; what trains saves first"))
            continue
        for label in _labels(run, name):
            words, reached = _stop(run, label)
            (said if reached else out_of_reach).extend([words] if words else [])
    print("\n".join(said) or f"nothing works on {url}{f' at {stage!r}' if stage else ''}, and nothing waits to.", flush=True)
    if out_of_reach:
        raise ConfigError("; ".join(out_of_reach))


def _labels(run: RunFolder, name: str) -> list[str]:
    """The stage and its shares, those that anybody ever worked on."""
    return [each.rstrip("/") for each in storage.list_level(run.at("locks")) if each.rstrip("/").partition(".")[0] == name]


def _stop(run: RunFolder, label: str) -> tuple[str, bool]:
    """Send a stop signal to the launcher that holds a stage, if it lives; what to say, and whether it could be reached."""
    found = lease.last_sign(run.url, label)
    if found is None or not lease.is_alive(*found):
        return "", True
    holder = found[0]
    if lease.is_here(holder):
        os.kill(holder.pid, signal.SIGTERM)
        return f"{label}: process {holder.pid} was told to stop; what trains saves first (launcher.py status {run.url})", True
    where = f"job {holder.job}, which launcher.py did not submit" if holder.job else f"process {holder.pid} on {holder.node}"
    return f"{label} is held by {where}: end it there", False
