"""A lease that keeps every stage, or share of a stage, to one launcher at a time, on any storage (docs/contracts.md, section 10).

    <run>/locks/<stage>/00000003.json    the file with the highest number is the lease; its holder rewrites it at every beat, and finally as released
                        request-*.json   a later start of the same job, which waits for the holder to save and end

A number is created once and never used again: of launchers that race for it one wins, and a launcher that was suspended sees that it has lost. Clocks of
different machines are never compared: whoever waits takes over when the lease file has not changed for the length of the lease, by its own clock. Kernel
locks and hard links are not needed; some shared file systems lack them, and S3 has neither.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from infra import environment, node_checks, objects, s3, storage, stored
from infra.errors import ConfigError, DataError, ExitCode, ReportedError, StopRequested, SupersededError
from infra.job import Job
from infra.run_records import Lease as LeaseRecord
from infra.run_records import Request
from infra.signals import StopFlag

log = logging.getLogger(__name__)

LEASE_S = 60.0
"""Seconds without a beat after which a launcher may be replaced; LAUNCHER_LEASE_S."""
BEATS = 6
"""Beats in that time: a lost or slow request does not cost the lease."""
PATIENCE_S = 540.0
"""Seconds that a restarted job waits for its predecessor: less than the other nodes wait for node 0."""
GRACE_S = 20.0
"""Seconds that a launcher gets to end after it has lost its lease."""
_VARIABLE = "LAUNCHER_LEASE"
_REQUEST = "request-"


@dataclass(frozen=True)
class Holder:
    """What a lease file says about the launcher that holds it."""

    token: str
    node: str
    pid: int
    process: str
    """Identifies the process among all that ran on this machine since it was booted; see ``_process``."""
    job: str
    restart: int
    begun: float
    """When it began, by the clock of its node; only shown to people."""
    lease_s: float
    beat: int = 0
    released: bool = False

    def described(self, sign_s: float) -> str:
        job = f" (job {self.job}, restart {self.restart})" if self.job else ""
        hours, minutes = divmod(max(0, round((time.time() - self.begun) / 60)), 60)
        age = f"for {hours} h {minutes} min" if self.begun else "since a time that it has not said"
        return f"process {self.pid} on {self.node}{job}, {age}, its last sign {max(0.0, sign_s):.0f} s ago"


class Lease:
    """A stage's lease in the hands of its holder; a thread renews it until it is closed or lost."""

    def __init__(self, place: str, number: int, holder: Holder) -> None:
        self.place, self.number, self.holder = place, number, holder
        self.lost = ""
        """Why it is no longer ours; empty while it is."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._answered: set[str] = set()
        self.end: Callable[[int], object] = os._exit

    @property
    def url(self) -> str:
        return _file(self.place, self.number)

    def start(self) -> None:
        """Renew it from now on."""
        self._thread.start()

    def close(self) -> None:
        """Release the lease, so that the next launcher need not wait."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(self.holder.lease_s)
        if self.lost:
            return
        try:
            _look(self.place, self.number)
            storage.write_json(self.url, asdict(replace(self.holder, released=True)))
        except SupersededError as error:
            self.lost = str(error)
        except ReportedError as error:  # the lease expires by itself
            log.warning("%s: the lease was not released: %s", self.place, error)

    def beat(self) -> None:
        """Renew the lease, and answer requests of later starts.

        Raises:
            SupersededError: another launcher has the lease, or a later start of this job asks for it.
        """
        names = _look(self.place, self.number)
        self.holder = replace(self.holder, beat=self.holder.beat + 1)
        storage.write_json(self.url, asdict(self.holder))
        for name in [name for name in names if name.startswith(_REQUEST) and name not in self._answered]:
            with suppress(DataError):  # withdrawn meanwhile, or damaged
                request = stored.read(storage.join(self.place, name), Request)
                self._answered.add(name)
                if request["job"] == self.holder.job and int(request["restart"]) > self.holder.restart:
                    log.warning("job %s was started again (restart %s): this start of it saves and ends", request["job"], request["restart"])
                    os.kill(os.getpid(), signal.SIGTERM)

    def _renew(self) -> None:
        while not self._ended.wait(self.holder.lease_s / BEATS):
            try:
                self.beat()
            except SupersededError as error:
                self._lose(str(error))
                return
            except ReportedError as error:  # while the storage is out, no other launcher can take over either
                log.warning("%s: the lease was not renewed: %s", self.place, error)

    def _lose(self, reason: str) -> None:
        """Stop this launcher and its ranks (which also check the lease before they write); after GRACE_S, end the process."""
        self.lost = reason
        log.warning("%s", reason)
        os.kill(os.getpid(), signal.SIGTERM)
        if not self._ended.wait(GRACE_S):
            self.end(ExitCode.REQUEUE)


def lives(run_url: str, label: str, job: str, restart: int) -> bool:
    """Whether the launcher of this start of a job still holds a lease. Where its process cannot be looked for, it is watched, for as long as its lease at most."""
    watch = _Watch(storage.join(run_url, "locks", label))
    while True:
        _, holder = watch.look()
        if holder is None or holder.released or (holder.job, holder.restart) != (job, restart) or watch.abandoned or _is_gone(holder):
            return False
        if watch.moved or _is_here(holder):
            return True
        time.sleep(holder.lease_s / (2 * BEATS))


def check() -> None:
    """Check that this process's launcher still holds its lease. To be called before a marker is written or anything is deleted; does nothing without a lease.

    Raises:
        SupersededError: another launcher has it.
    """
    place, _, number = environment.text(_VARIABLE).rpartition("#")
    if place:
        _look(place, int(number))


@contextmanager
def hold(run_url: str, label: str, job: Job, stop: StopFlag | None = None) -> Iterator[Lease]:
    """Hold the lease of a stage or share for the block.

    Raises:
        ConfigError: another launcher has it, and this is not a restart of a job (which would wait).
        SupersededError: another launcher has it, and has not ended within PATIENCE_S.
        StopRequested: a stop signal came while this one waited.
    """
    if storage.is_remote(run_url) and s3.kept_apart():
        log.warning("%s: objects are created without a condition: the scheduler keeps launchers apart (cluster.kept_apart)", run_url)
    lease = _take(storage.join(run_url, "locks", label), f"{run_url}: another launcher runs '{label}' in this folder", job, stop)
    before = environment.text(_VARIABLE)
    os.environ[_VARIABLE] = f"{lease.place}#{lease.number}"  # read by ``check`` in the ranks
    lease.start()
    try:
        yield lease
    finally:
        del os.environ[_VARIABLE]
        if before:
            os.environ[_VARIABLE] = before
        lease.close()


def _take(place: str, what: str, job: Job, stop: StopFlag | None) -> Lease:
    watch, request = _Watch(place), ""
    deadline = time.monotonic() + PATIENCE_S
    try:
        while True:
            number, holder = watch.look()
            if holder is None or holder.released or watch.abandoned or _is_gone(holder):
                if holder is not None and not holder.released:
                    log.warning("%s: taken over from %s", place, holder.described(watch.still_s))
                lease = Lease(place, number + 1, _myself(job))
                if storage.create_once(lease.url, (json.dumps(asdict(lease.holder), sort_keys=True) + "\n").encode()):
                    if storage.is_remote(place):
                        objects.store(place).check_creation(lease.url)
                    _forget(place, number)
                    return lease
                continue
            if stop:
                raise StopRequested("a stop signal before the start; nothing was begun.")
            waits = bool(job.id) and (job.restart > 0 or job.id == holder.job)
            if not waits and (watch.moved or watch.sign_s() <= holder.lease_s):
                raise ConfigError(f"{what}: {holder.described(watch.sign_s())}; wait for it, or use another run.name.")
            if waits and time.monotonic() > deadline:
                raise SupersededError(f"{what}: {holder.described(watch.sign_s())}; it did not end within {PATIENCE_S:.0f} s. Nothing was begun.")
            if waits and not request:
                request = storage.join(place, f"{_REQUEST}{secrets.token_hex(8)}.json")
                storage.write_json(request, {"job": job.id, "restart": job.restart})
                log.warning("%s: %s; waiting for it", what, holder.described(watch.sign_s()))
            time.sleep(min(2.0, holder.lease_s / (2 * BEATS)))
    finally:
        if request:
            storage.delete(request)


class _Watch:
    """Reads the newest lease repeatedly, and measures by this machine's clock how long it has not changed."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._seen: tuple[int, Holder | None] | None = None
        self._since = _now()
        self.moved = False
        """Whether it has changed since the first look."""

    def look(self) -> tuple[int, Holder | None]:
        number = max(_numbers(storage.list_files(self._place)), default=-1)
        holder = _read(self._place, number) if number >= 0 else None
        if (number, holder) != self._seen:
            self.moved |= self._seen is not None
            self._seen, self._since = (number, holder), _now()
        return number, holder

    @property
    def still_s(self) -> float:
        return _now() - self._since

    @property
    def abandoned(self) -> bool:
        return self._seen is not None and self._seen[1] is not None and self.still_s > self._seen[1].lease_s

    def sign_s(self) -> float:
        """Age of the last beat by the storage's clock. Good enough to refuse a second launcher, but not to take over: some mounts store the writer's time."""
        assert self._seen is not None
        probe = storage.join(self._place, f"{storage.TEMPORARY}probe-{secrets.token_hex(8)}")
        storage.write_bytes(probe, b"")
        try:
            return storage.modified(probe) - storage.modified(_file(self._place, self._seen[0]))
        finally:
            storage.delete(probe)


def _look(place: str, number: int) -> list[str]:
    """Names of the files in the lock's folder, if this number is still the newest.

    Raises:
        SupersededError: it is not.
    """
    names = storage.list_files(place)
    newest = max(_numbers(names), default=-1)
    if newest == number:
        return names
    holder = _read(place, newest) if newest >= 0 else None
    by = f"process {holder.pid} on {holder.node}" if holder is not None else "somebody who deleted it"
    raise SupersededError(
        f"{place}: this launcher was silent for longer than its lease, and the work was taken over by {by}; nothing more is written here."
    )


def _numbers(names: list[str]) -> list[int]:
    return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()]


def _file(place: str, number: int) -> str:
    return storage.join(place, f"{number:08d}.json")


def _read(place: str, number: int) -> Holder:
    """The holder in a lease file; an unknown holder while the file is still empty, which file systems without hard links show."""
    try:
        found = stored.read(_file(place, number), LeaseRecord)
        return Holder(**{field.name: found[field.name] for field in fields(Holder) if field.name in found})
    except DataError:
        return Holder("", "a node that has not said more", 0, "", "", 0, 0.0, _lease_s())


def _forget(place: str, number: int) -> None:
    """Delete the lease files before the one that was just taken."""
    for old in _numbers(storage.list_files(place)):
        if old <= number:
            storage.delete(_file(place, old))


def _lease_s() -> float:
    return environment.seconds("LAUNCHER_LEASE_S", LEASE_S)


def _now() -> float:
    """A monotonic clock that also advances while this machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _myself(job: Job) -> Holder:
    return Holder(secrets.token_hex(16), node_checks.node_name(), os.getpid(), _process(os.getpid()), job.id, job.restart, time.time(), _lease_s())


def _process(pid: int) -> str:
    """An identity that no other process on any machine has: boot id, pid namespace, pid and start tick; empty if the process is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return "" if status[0] in "ZX" else f"{boot} {space} {pid} {status[19]}"


def _is_gone(holder: Holder) -> bool:
    """Whether the holder ran on this machine, where its process can be looked for, and does no more."""
    return _is_here(holder) and _process(holder.pid) != holder.process


def _is_here(holder: Holder) -> bool:
    """Whether the holder's process is, or was, one of this machine that can be looked for."""
    mine = _process(os.getpid())
    return holder.process.split()[:2] == mine.split()[:2] and bool(mine) and bool(holder.process)


def last_sign(run_url: str, label: str) -> tuple[Holder, float] | None:
    """Who holds a stage, or held it last, and how many seconds ago it showed a sign, by this machine's clock and the storage's; None: nobody ever did. For those
    who only look: nothing is written."""
    place = storage.join(run_url, "locks", label)
    number = max(_numbers(storage.list_files(place)), default=-1)
    if number < 0:
        return None
    return _read(place, number), max(0.0, time.time() - storage.modified(_file(place, number)))


def is_alive(holder: Holder, sign_s: float) -> bool:
    """Whether a launcher works on, as far as one can tell who does not wait for its next sign."""
    return not holder.released and not _is_gone(holder) and sign_s <= holder.lease_s


def at_work(run_url: str, label: str) -> Holder | None:
    """Who works on a stage, as far as one can tell who only looks; None: nobody does."""
    sign = last_sign(run_url, label)
    return sign[0] if sign is not None and is_alive(*sign) else None


def is_here(holder: Holder) -> bool:
    """Whether the holder is a process of this machine that still runs."""
    return bool(holder.process) and _process(holder.pid) == holder.process
