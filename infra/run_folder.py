"""The run folder: configuration, provenance, stage markers, exit records and the lock of a stage (docs/contracts.md, section 10)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from infra import deferred_writes, exit_records, kept_within, lease, node_folder, run_records, schemas, shown, storage, stored, strict_json
from infra.config import differences
from infra.errors import ConfigError, MissingError, UnreachableError
from infra.job import Job
from infra.lease import Lease
from infra.repository import commit as commit
from infra.signals import StopFlag

_PACKAGES = ("torch", "deepspeed", "mosaicml-streaming", "sentencepiece", "numpy", "pydantic")
_OF_EVERY_STAGE = ("attention", "exits", "jobs", "live", "locks", "logs", "preflight", "tensorboard")
"""Folders that any stage writes to."""
_ATTEMPT = re.compile(r"attempt-([0-9]{1,9})/")
_POLL_S = 0.5  # between looks at what other nodes have written
_NO_JOB = Job()


Allowed = Callable[[str], bool]
"""Whether a run may continue with another value of a key."""


def _none(key: str) -> bool:
    return False


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def producer() -> dict[str, Any]:
    """Commit and versions that made an output, for manifests."""
    return {"commit": commit(), "versions": versions()}


class RunFolder:
    """One run's folder, local or on s3."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if not storage.is_remote(self.url):
            kept_within.keep(storage.local_path(self.url))

    def at(self, *parts: str) -> str:
        """URL of a file or folder inside."""
        return storage.join(self.url, *parts)

    @property
    def config_url(self) -> str:
        return self.at("config.json")

    def stored(self) -> dict[str, Any] | None:
        """The configuration in the folder, as it was written; None if the folder holds no run.

        Raises:
            ConfigError: the folder has another schema: another version of this code wrote it.
        """
        found = stored.read_if_there(self.config_url, run_records.Config)
        if found is not None:
            self.check_schema()
        return found

    def check_schema(self) -> None:
        """Refuse a folder with another schema, because its markers and records could be misread.

        Raises:
            ConfigError: it has another schema.
        """
        self._provenance()

    def _provenance(self) -> dict[str, Any]:
        url = self.at("provenance.json")
        return _of_known_schema(url, stored.read_if_there(url, run_records.Provenance) or {})

    def create(self, config: dict[str, Any], command: str) -> bool:
        """Take a folder that holds no run yet, by creating its configuration. Of launchers that race for it, one gets True; nothing of the others remains.

        Args:
            config: the resolved configuration.
            command: the command line that makes the folder, for people.

        Raises:
            ConfigError: the folder is unwritable.
        """
        storage.check_writable(self.url)
        now = time.time()
        facts = {"schema": schemas.RUN, "created": now, "command": command, "places": [{"url": storage.absolute(self.url), "time": now}]}
        url = self.at("provenance.json")
        first = storage.create_once(
            url, strict_json.written(producer() | facts)
        )  # before the configuration, which without it belongs to no run folder
        if not storage.create_once(self.config_url, strict_json.written(config)):
            return False
        if not first:  # it is from a launcher that lost, or that was killed before it had a configuration
            storage.write_json(url, producer() | facts)
        return True

    def withdraw(self) -> None:
        """Take back what ``create`` made, if nothing else has come into the folder since: no job was submitted, no launcher has begun."""
        made = ("config.json", "provenance.json")  # in this order: without its configuration it is no run
        if set(storage.list_files(self.url)) <= set(made):
            for name in made:
                storage.delete(self.at(name))
            if not storage.is_remote(self.url):
                for folder in (storage.local_path(self.at("logs")), storage.local_path(self.url)):
                    with contextlib.suppress(OSError):  # not empty, or not there
                        folder.rmdir()

    def claim(
        self,
        config: dict[str, Any],
        command: str,
        complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
        allowed: Allowed = _none,
        *,
        change: bool = True,
    ) -> list[str]:
        """Write the resolved configuration, or check that the folder already holds the same one; and note where the folder lies.

        Args:
            config: the resolved configuration.
            command: the command line that made the folder, for people.
            complete: returns a stored configuration with its missing keys filled in.
            allowed: whether the run may continue with another value of a key. Such a value replaces the stored one, and provenance.json records the change.
            change: whether other values are written; a launcher that does not hold its stage yet writes none.

        Returns:
            What differs from the stored configuration.

        Raises:
            ConfigError: the folder is unwritable, or holds another configuration; the differences are listed.
        """
        stored = self.stored()
        if stored is None:
            if self.create(config, command):
                return []
            stored = self.stored() or {}
        else:
            storage.check_writable(self.url)
        changed = differences(complete(stored), config)
        fixed = [line for line in changed if not allowed(line.partition(": ")[0])]
        if fixed:
            raise ConfigError(
                f"{self.url} holds a run with another configuration; use another run.name, or the values of the folder:\n  "
                + "\n  ".join(fixed)
                + "\n  (folder -> given)"
            )
        if changed and not change:
            return changed
        self._note(storage.absolute(self.url), changed)
        if changed:
            storage.write_json(self.config_url, config)
            print(f"{self.url} goes on with other values:\n  " + "\n  ".join(changed), flush=True)
        return changed

    def _note(self, place: str, changed: list[str]) -> None:
        """Add to provenance.json where the folder lies now, if it has moved, and which keys of its configuration changed."""
        provenance = self._provenance()
        places = provenance.get("places", [])
        now = {"time": time.time()}
        moved = not places or places[-1]["url"] != place
        older = provenance.get("schema") != schemas.RUN  # what is written from here on is of the new schema
        provenance["schema"] = schemas.RUN
        if moved:
            provenance["places"] = [*places, {"url": place} | now]
        if changed:
            provenance["changes"] = [*provenance.get("changes", []), now | {"commit": commit(), "changed": changed}]
        if moved or changed or older:
            storage.write_json(self.at("provenance.json"), provenance)

    def refuse_links(self, *names: str) -> None:
        """Refuse links that lead out of this folder, in those of its folders that are about to be written to, and in those of every stage's records.

        Raises:
            ConfigError: there is one.
        """
        if not storage.is_remote(self.url):
            kept_within.refuse_links(storage.local_path(self.url), (*names, *_OF_EVERY_STAGE))

    def done(self, stage: str, *, once: bool = False) -> dict[str, Any] | None:
        """What a finished stage wrote last, or None.

        Args:
            once: of a stage that does not run now: the ranks of a node fetch it once.
        """
        url = self.at(stage, "done.json")
        if not once:
            return stored.read_if_there(url, run_records.Done)
        try:
            found: dict[str, Any] = node_folder.json_once(url)
        except MissingError:
            return None
        stored.check(found, run_records.Done, url)
        return found

    def finish(self, stage: str, **facts: Any) -> None:
        """Mark a stage as finished: its last write.

        Raises:
            SupersededError: another launcher has the stage.
        """
        lease.check()
        storage.write_json(self.at(stage, "done.json"), {"stage": stage, "commit": commit(), "finished": time.time(), **facts})

    def begin_attempt(self, stage: str, **facts: Any) -> int:
        """Begin a new attempt at a stage and return its number, which follows the highest existing one; ``facts`` go into its begin.json."""
        attempt = max(self.attempts(stage), default=-1) + 1
        storage.write_json(self.attempt_url(stage, attempt, "begin.json"), {"time": time.time(), "pid": os.getpid(), **facts})
        return attempt

    def attempts(self, stage: str) -> list[int]:
        """Numbers of the attempts at a stage, oldest first."""
        return sorted(int(found[1]) for name in storage.list_level(self.at("exits", stage)) if (found := _ATTEMPT.fullmatch(name)))

    def attempt_url(self, stage: str, attempt: int, *parts: str) -> str:
        """URL of an attempt's folder, or of a file in it."""
        return self.at("exits", stage, f"attempt-{attempt}", *parts)

    def wait_for_records(
        self, stage: str, attempt: int, size: int, timeout_s: float, most: int | None = None
    ) -> tuple[list[exit_records.Record], bool]:
        """Wait until every node has recorded how its ranks ended, or a rank has recorded a code that decides the attempt, or time is up.

        Waiting matters because the scheduler may kill the other nodes as soon as one launcher ends.

        Args:
            most: how many rank-<r>.json files are read; None: all.

        Returns:
            The records, the earliest first, and whether all ranks have ended.
        """
        deadline, seen = time.monotonic() + timeout_s, exit_records.Records(self.attempt_url(stage, attempt), most)
        while True:
            records = seen.look()
            if seen.complete(size) or exit_records.says_enough(records) or time.monotonic() > deadline:
                return records, seen.complete(size)
            time.sleep(_POLL_S)

    def records(self, stage: str, attempt: int) -> list[exit_records.Record]:
        """The records of the ranks of an attempt that have ended, the earliest first."""
        return exit_records.Records(self.attempt_url(stage, attempt)).look()

    def record_exit(self, stage: str, attempt: int, rank: int, code: int, reason: str, *, alone: bool = False) -> None:
        """Record how a rank ended; the agent's exit code follows from these records.

        A record with code 0 or 75 goes to the launcher's summary. In a storage outage the launcher writes the record later (``infra/deferred_writes.py``).

        Args:
            alone: this rank ends without the agreement of the others, which will look for its reason: write a file of its own in any case.

        Raises:
            UnreachableError: the storage does not answer, and there is no launcher that could write later.
        """
        url = self.attempt_url(stage, attempt, f"rank-{rank}.json")
        record = {"rank": rank, "code": int(code), "reason": shown.message(reason), "time": time.time()}
        if code in exit_records.ALIKE and not alone and node_folder.leave_exit(record):
            return
        try:
            storage.write_json(url, record)
        except UnreachableError:
            if not deferred_writes.note(f"rank {rank} ended with {int(code)}, {reason}", url, record | {"reason": f"storage unreachable: {reason}"}):
                raise

    def root_cause(self, stage: str, attempt: int, size: int) -> tuple[int, str]:
        """Exit code and reason of an attempt, from its records; see ``exit_records.root_cause``."""
        return exit_records.root_cause(self.records(stage, attempt), size)

    def lock(self, stage: str, job: Job = _NO_JOB, stop: StopFlag | None = None) -> contextlib.AbstractContextManager[Lease]:
        """Hold the stage's lease; see ``lease.hold``."""
        return lease.hold(self.url, stage, job, stop)


def _of_known_schema(url: str, provenance: dict[str, Any]) -> dict[str, Any]:
    schemas.require(
        provenance.get("schema", schemas.OLDER_RUN), schemas.RUN, url, "make the run anew: launcher.py demo PRESET run.name=NAME", schemas.OLDER_RUN
    )
    return provenance


def place_of(config_url: str) -> dict[str, str]:
    """``root`` and ``name`` of the run folder that holds a config.json; empty if it does not lie in a run folder.

    Raises:
        ConfigError: the folder is a whole bucket or file system, or has another schema.
    """
    folder, _, name = config_url.rpartition("/")
    folder = folder if "://" in config_url else folder or "."
    if name != "config.json":
        return {}
    url = storage.join(folder, "provenance.json")
    try:
        provenance = node_folder.json_once(url)
    except MissingError:
        return {}
    stored.check(provenance, run_records.Provenance, url)
    _of_known_schema(url, provenance)
    if folder.startswith("file://"):
        folder = str(storage.local_path(folder))  # a name is literal, without the escapes of a URL
    if not storage.is_remote(folder) and storage.local_path(folder).name in ("", ".."):  # '.' and '..' are paths, but not names of runs
        folder = str(storage.local_path(folder).resolve())
    root, _, name = folder.rstrip("/").rpartition("/")
    if not name or root.endswith(":/"):
        raise ConfigError(f"{config_url}: a run folder must be inside a folder or below a bucket; move it there.")
    return {"root": root or ("/" if folder.startswith("/") else "."), "name": name}
