"""The run folder: configuration, provenance, stage markers, exit records and the lock of a stage (docs/contracts.md, section 10)."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import time
from collections.abc import Collection
from functools import cache
from importlib import metadata
from typing import Any

from infra import deferred_writes, lease, shown, storage
from infra.config import differences
from infra.errors import ConfigError, ExitCode, UnreachableError
from infra.job import Job
from infra.lease import Lease
from infra.repository import REPOSITORY
from infra.signals import StopFlag

_PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "sentencepiece", "numpy", "pydantic")
_POLL_S = 0.5  # between looks at what other nodes have written
_NO_JOB = Job()
_OWN_CODES = (ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.DIVERGED)


@cache
def commit() -> str:
    """The commit of this checkout, with ``+dirty`` where tracked files differ from it; ``unknown`` outside a checkout. Asked once in a process:
    what is checked out while it runs is not what runs."""
    try:
        head = subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "-C", str(REPOSITORY), "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if dirty else "")


def versions() -> dict[str, str]:
    """Versions of what shapes results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def producer() -> dict[str, Any]:
    """Who made an output: for manifests."""
    return {"commit": commit(), "versions": versions()}


class RunFolder:
    """One run's folder, local or on s3."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def at(self, *parts: str) -> str:
        """URL of a file or folder inside."""
        return storage.join(self.url, *parts)

    @property
    def config_url(self) -> str:
        return self.at("config.json")

    def claim(self, config: dict[str, Any], command: str, may_change: Collection[str] = ()) -> None:
        """Write the resolved configuration, or check that the folder already holds the same one.

        Args:
            config: the resolved configuration.
            command: the command line that made the folder, for people.
            may_change: sections and section.keys that a run may go on with other values of: these replace the folder's, and provenance.json keeps the change.

        Raises:
            ConfigError: the folder is unwritable, or holds another configuration; the differences are listed.
        """
        storage.check_writable(self.url)
        if not storage.exists(self.config_url):
            storage.write_json(self.at("provenance.json"), producer() | {"created": time.time(), "command": command})
            storage.write_json(self.config_url, config)
            return
        changed = differences(storage.read_json(self.config_url), config)
        fixed = [line for line in changed if not {(key := line.partition(": ")[0]), key.partition(".")[0]} & set(may_change)]
        if fixed:
            raise ConfigError(
                f"{self.url} holds a run with another configuration; use another run.name, or the values of the folder:\n  "
                + "\n  ".join(fixed)
                + "\n  (folder -> given)"
            )
        if changed:
            provenance = storage.read_json(self.at("provenance.json"))
            provenance["changes"] = [*provenance.get("changes", []), {"time": time.time(), "commit": commit(), "changed": changed}]
            storage.write_json(self.at("provenance.json"), provenance)
            storage.write_json(self.config_url, config)
            print(f"{self.url} goes on with other values:\n  " + "\n  ".join(changed), flush=True)

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage wrote last, or None."""
        url = self.at(stage, "done.json")
        return storage.read_json(url) if storage.exists(url) else None

    def finish(self, stage: str, **facts: Any) -> None:
        """Mark a stage finished. The stage's last write.

        Raises:
            SupersededError: another launcher has the stage.
        """
        lease.check()
        storage.write_json(self.at(stage, "done.json"), {"stage": stage, "commit": commit(), "finished": time.time(), **facts})

    def begin_attempt(self, stage: str, **facts: Any) -> int:
        """Number of a new attempt at a stage, counted by the exit records' folders; facts go into its begin.json."""
        attempt = max(self._attempts(stage), default=-1) + 1
        storage.write_json(self.at("exits", stage, f"attempt-{attempt}", "begin.json"), {"time": time.time(), "pid": os.getpid(), **facts})
        return attempt

    def wait_for_records(self, stage: str, attempt: int, size: int, timeout_s: float) -> None:
        """Wait until every rank of all nodes has recorded its end, or one a code of its own, or time is up: whoever leaves early may end the rest."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            records = self.records(stage, attempt)
            if len(records) >= size or any(record["code"] in _OWN_CODES for record in records):
                return
            time.sleep(_POLL_S)

    def _attempts(self, stage: str) -> set[int]:
        names = storage.list_files(self.at("exits", stage))
        return {int(name.split("/")[0].removeprefix("attempt-")) for name in names if name.endswith("/begin.json")}

    def records(self, stage: str, attempt: int) -> list[dict[str, Any]]:
        """How the ranks of an attempt ended, those that have, the earliest first."""
        base = self.at("exits", stage, f"attempt-{attempt}")
        names = [name for name in storage.list_files(base) if name.startswith("rank-")]
        return sorted((storage.read_json(storage.join(base, name)) for name in names), key=lambda record: record["time"])

    def record_exit(self, stage: str, attempt: int, rank: int, code: int, reason: str) -> None:
        """Record how a rank ended; the agent's exit code follows from these records. In an outage the launcher does it later (``infra/deferred_writes.py``).

        Raises:
            UnreachableError: the storage gives no answer, and no launcher takes notes.
        """
        url = self.at("exits", stage, f"attempt-{attempt}", f"rank-{rank}.json")
        record = {"rank": rank, "code": int(code), "reason": shown.message(reason), "time": time.time()}
        try:
            storage.write_json(url, record)
        except UnreachableError:
            if not deferred_writes.note(f"rank {rank} ended with {int(code)}, {reason}", url, record | {"reason": f"storage unreachable: {reason}"}):
                raise

    def root_cause(self, stage: str, attempt: int, size: int) -> tuple[int, str]:
        """Exit code and reason of an attempt: the earliest record with a code of its own, then a rank that left none, then a crash, then 75."""
        records = self.records(stage, attempt)
        for record in records:
            if record["code"] in _OWN_CODES:
                return record["code"], f"rank {record['rank']}: {record['reason']}"
        if len(records) < size:
            silent = sorted(set(range(size)) - {record["rank"] for record in records})
            said = next((f"; rank {record['rank']}: {record['reason']}" for record in records if record["code"] == ExitCode.CRASH), "")
            return ExitCode.CRASH, f"rank {silent[0]} ended without a record: it was killed{said}"
        for record in records:
            if record["code"] not in (ExitCode.DONE, ExitCode.REQUEUE):
                return ExitCode.CRASH, f"rank {record['rank']}: {record['reason']}"
        for record in records:
            if record["code"] == ExitCode.REQUEUE:
                return ExitCode.REQUEUE, record["reason"]
        return ExitCode.DONE, "finished"

    def lock(self, stage: str, job: Job = _NO_JOB, stop: StopFlag | None = None) -> contextlib.AbstractContextManager[Lease]:
        """Hold the stage's lease; see ``lease.hold``."""
        return lease.hold(self.url, stage, job, stop)
