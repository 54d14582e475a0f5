"""The meeting of the launchers of a job's nodes: a key-value store (torch's TCPStore) served by node 0's launcher.

Through it node 0 tells the other nodes which attempt this is and, at the end, how it ended, so that node 0 alone reads the records in the run folder. In
between, nodes give signs of life. The keys:

    hello      job, restart, attempt and the id of this start; a scheduler may reuse its own ids (suspend and resume), this one is new for each start
    seat-<i>   taken once, by the launcher of node i; so a node 0 of an earlier start, which is still saving, has no free seat to offer
    sign-<i>   a counter that node i increases while it lives
    end        code and reason, once node 0 knows them
    heard      how many nodes have read the end
"""

from __future__ import annotations

import errno
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from infra import interfaces
from infra.errors import LostPeerError, StopRequested
from infra.job import Job
from infra.signals import StopFlag

if TYPE_CHECKING:
    from torch.distributed import TCPStore

log = logging.getLogger(__name__)

RENDEZVOUS_S = 600  # images are pulled and environments loaded at different speeds
PORTS = 16
"""How many consecutive ports node 0 tries."""
SILENT_S = 20.0
"""Seconds without a sign of life after which a node is reported as silent."""
HEARD_S = 10.0
"""Seconds that node 0 waits for the others to read how the attempt ended."""
_SAY_S = 30.0  # between log lines that say which nodes are being waited for
_SIGN_S = 5.0  # between signs of life
_LOOK_S = 5.0  # time-out of connecting to node 0, which may not be there yet
_ANSWER_S = 60  # time-out of a request to the store
_POLL_S = 0.2
_MUTE_S = 60.0  # between attempts at a port where another program listens; each attempt costs a thread


class Meeting:
    """One node's part in the meeting of one start of a job.

    Args:
        place: host:port where node 0 serves the store.
        start: id of this start.
    """

    def __init__(self, job: Job, store: TCPStore, place: str, attempt: int, start: str) -> None:
        self.job, self.place, self.attempt, self.start = job, place, attempt, start
        self._store = store
        self._ended = threading.Event()
        self._signs: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._live, name="meeting", daemon=True)
        self._thread.start()

    def missing(self) -> list[int]:
        """Nodes that have not joined yet. For node 0."""
        return [node for node in range(1, self.job.nodes) if not self._store.check([f"seat-{node}"])]

    def silent(self) -> str:
        """Which nodes no longer give signs of life, in words; '' if all do. For node 0."""
        now = time.monotonic()
        gone = [(node, now - since) for node, (_, since) in sorted(self._signs.items()) if now - since > SILENT_S]
        return "; ".join(f"node {node} ({self._name(node)}) has given no sign for {age:.0f} s: it is lost, or the link to it" for node, age in gone)

    def tell(self, code: int, reason: str) -> None:
        """Say how the attempt ended, and wait until the others have read it, at most HEARD_S. For node 0."""
        self._store.set("end", json.dumps([code, reason]))
        deadline, others = time.monotonic() + HEARD_S, self.job.nodes - 1 - len(self.missing())
        while self._store.add("heard", 0) < others and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def hear(self, timeout_s: float) -> tuple[int, str] | None:
        """How the attempt ended, from node 0; None if node 0 says nothing in time."""
        from torch.distributed import DistNetworkError, DistStoreError

        deadline = time.monotonic() + timeout_s
        try:
            while time.monotonic() < deadline:
                if self._store.check(["end"]):
                    code, reason = json.loads(self._store.get("end"))
                    self._store.add("heard", 1)
                    return int(code), str(reason)
                time.sleep(_POLL_S)
        except (DistNetworkError, DistStoreError):
            pass
        return None

    def close(self) -> None:
        """Stop giving signs of life."""
        self._ended.set()

    def _name(self, node: int) -> str:
        return self._store.get(f"seat-{node}").decode().partition(" ")[2]

    def _live(self) -> None:
        """Give signs of life; on node 0, log which nodes are missing, and note the signs of the others."""
        began, said = time.monotonic(), 0.0
        while not self._ended.wait(_SIGN_S):
            try:
                if self.job.node:
                    self._store.add(f"sign-{self.job.node}", 1)
                    continue
                missing = self.missing()
                waited = time.monotonic() - began
                if missing and waited - said > _SAY_S:
                    said = waited
                    log.warning("waiting for node %s of %d (%.0f s)", ", ".join(map(str, missing)), self.job.nodes, waited)
                self._note(missing)
            except Exception as error:  # the store or the network is gone; the code that needs the store will report it
                log.debug("meeting: %s", error)
                return

    def _note(self, missing: list[int]) -> None:
        for node in range(1, self.job.nodes):
            if node not in missing:
                count = int(self._store.add(f"sign-{node}", 0))
                if node not in self._signs or self._signs[node][0] != count:
                    self._signs[node] = count, time.monotonic()


def host(job: Job, begin: Callable[[str, str], int]) -> Meeting:
    """Open the meeting, as node 0.

    Args:
        begin: called with the id of this start and the place; begins the attempt and returns its number.

    Raises:
        LostPeerError: no port is free, or the host name given for node 0 is not this node's.
    """
    store, place = _serve(job)
    start = secrets.token_hex(8)
    attempt = begin(start, place)
    store.set("hello", json.dumps({"job": job.id, "restart": job.restart, "attempt": attempt, "start": start}))
    return Meeting(job, store, place, attempt, start)


def _serve(job: Job) -> tuple[TCPStore, str]:
    name, first = interfaces.split(job.rendezvous)
    for port in range(first, first + PORTS):
        try:
            store = None if _in_use(name, port) else _store(name, port, serves=True)
        except RuntimeError as error:  # torch's own errors of stores are
            if "EADDRINUSE" not in str(error) and "in use" not in str(error):
                raise LostPeerError(
                    f"node 0 of job {job.run_id} cannot use {job.rendezvous}, where it meets the others ({error}): is the name another node's?"
                ) from error
            store = None
        if store is None:
            log.warning("port %d is in use on node 0 (%s) by another program or job; the next one is tried", port, name)
            continue
        if port != first:
            log.warning("the launchers of job %s meet at port %d, which the record of the attempt names", job.run_id, port)
        return store, interfaces.endpoint(name, port)
    raise LostPeerError(f"node 0 of job {job.run_id} finds no free port from {first} to {first + PORTS - 1}: free one, or set LAUNCHER_RENDEZVOUS.")


def _in_use(name: str, port: int) -> bool:
    """Whether another program has this very address. torch would serve the other family of addresses at that port, and ask that program as if it were its store."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError:  # torch says more of such a name
        return False
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended does not count
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
    return False


def join(job: Job, stage: str, stop: StopFlag, recorded: Callable[[], str]) -> Meeting:
    """Find the meeting and take this node's seat, as a node other than 0.

    Args:
        recorded: returns where this start's newest attempt meets, according to its record; '' if there is none yet.

    Raises:
        LostPeerError: node 0 did not begin.
        StopRequested: a stop signal came while this node waited.
    """
    began, said, place, mute = time.monotonic(), 0.0, job.rendezvous, dict[str, float]()
    token = f"{secrets.token_hex(8)} {job.address or socket.gethostname()}"
    while True:
        found = None
        if time.monotonic() - mute.get(place, -_MUTE_S) >= _MUTE_S:
            found = _take_seat(job, place, token, stop, mute)
        if found is not None:
            return found
        waited = time.monotonic() - began
        if stop.received:
            raise StopRequested(f"{stop.received.name} before node 0 had begun; nothing was begun here.")
        if waited > RENDEZVOUS_S:
            raise LostPeerError(f"node 0 of job {job.run_id} did not begin '{stage}' at {job.rendezvous} within {RENDEZVOUS_S} s: see its log.")
        if waited - said > _SAY_S:
            said = waited
            log.warning("waiting for node 0 of %d at %s (%.0f s)", job.nodes, job.rendezvous, waited)
        time.sleep(1)
        place = job.rendezvous if place != job.rendezvous or waited < _LOOK_S else recorded() or job.rendezvous


def _take_seat(job: Job, place: str, token: str, stop: StopFlag, mute: dict[str, float]) -> Meeting | None:
    """The meeting at a place, if it belongs to this start and has a seat for this node.

    Args:
        mute: places where something listens that does not answer like a store, and when that was found out.
    """
    name, port = interfaces.split(place)
    try:
        socket.create_connection(
            (name, port), timeout=_LOOK_S
        ).close()  # tried first: torch's client ignores stop signals while it waits, and prints stack frames for every failed attempt
    except OSError:  # node 0, or its name in DNS, is not there yet
        return None
    try:
        answered = _asked(name, port)
        if answered is None:
            mute[place] = time.monotonic()
            return None
        store = answered
        deadline = time.monotonic() + _ANSWER_S
        while not store.check(["hello"]):
            if stop.received or time.monotonic() > deadline:
                return None
            time.sleep(_POLL_S)
        hello: dict[str, Any] = json.loads(store.get("hello"))
        if (hello["job"], hello["restart"]) != (job.id, job.restart):
            return None  # another job with the same port
        if store.compare_set(f"seat-{job.node}", "", token).decode() != token:
            log.warning("%s is an earlier start of job %s, in which node %d has a place already; waiting for the new one", place, job.id, job.node)
            return None
    except (RuntimeError, ValueError, KeyError):  # not a store of ours, or one that has just closed
        return None
    return Meeting(job, store, place, int(hello["attempt"]), str(hello["start"]))


def _asked(name: str, port: int) -> TCPStore | None:
    """A client of another process's store; None if what listens there does not answer like a store. Asked in a thread, as torch's client would wait for ever."""
    found: list[TCPStore | BaseException] = []

    def ask() -> None:
        try:
            found.append(_store(name, port, serves=False))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="meeting: a first question", daemon=True)
    thread.start()
    thread.join(2 * _LOOK_S)
    if not found:
        return None
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _store(name: str, port: int, *, serves: bool) -> TCPStore:
    from torch.distributed import TCPStore

    # multi_tenant: elastic, in the same process, shares this store.
    wait = _ANSWER_S if serves else _LOOK_S
    store = TCPStore(name, port, is_master=serves, wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=wait))
    store.set_timeout(timedelta(seconds=_ANSWER_S))
    return store
