"""The agent: starts the ranks of a stage on this node through torch's elastic API, and turns the way they end into one exit code."""

from __future__ import annotations

import logging
import os
import socket
import sys
import uuid
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from infra import (
    announce,
    deferred_writes,
    environment,
    evidence,
    exit_records,
    interfaces,
    ledger,
    listening,
    meeting,
    node_folder,
    scratch,
    signals,
)
from infra.errors import ExitCode, LostPeerError, StopRequested
from infra.job import RETRIES, Job
from infra.meeting import RENDEZVOUS_S, Meeting
from infra.run_folder import RunFolder
from infra.signals import StopFlag

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

log = logging.getLogger(__name__)

TRACKER_NOTES = "ignore:resource_tracker:UserWarning"
"""Silences the warning that Python's resource tracker prints about shared memory of a killed rank. Our own claims remove those segments
(data_pipeline/loading/shared_memory.py)."""
_PEERS_S = 60  # nodes end within seconds of each other, or not at all
_LOST_S = 10  # wait for records once node 0 is gone: its ranks died with it
_FEW = 32  # rank records that a node other than 0 reads, where node 0 does not tell how the attempt ended


@dataclass(frozen=True)
class Placement:
    """Where ranks run."""

    nproc: int
    """Ranks on each node."""
    job: Job = field(default_factory=Job)
    """This node's place in the scheduler's job."""
    retries: int | None = None
    """Crashes in a row that are retried; None: LAUNCHER_RETRIES if it is set, else RETRIES."""
    trains: bool = False
    """Whether the stage writes checkpoints; without new ones, starts in a row are known to make no progress."""

    @property
    def nodes(self) -> int:
        return self.job.nodes

    @property
    def size(self) -> int:
        return self.nproc * self.nodes


def _threads(nproc: int) -> str:
    return str(environment.threads(max(1, len(os.sched_getaffinity(0)) // nproc)))


def run_ranks(arguments: list[str], placement: Placement, run: RunFolder, stage: str, stop: StopFlag) -> tuple[int, str]:
    """Run ``python ARGUMENTS`` as every rank of this node and wait until all have ended. A stop signal is passed to the ranks, and sets ``stop``.

    Returns:
        Exit code and reason, derived from the ranks' records (docs/contracts.md, section 1).

    Raises:
        LostPeerError: the nodes of the job did not meet.
    """
    _import_quietly()
    job = placement.job
    attempt, met = _begin_together(placement, run, stage, stop)
    known = os.environ.get("PYTHONWARNINGS", "")
    if TRACKER_NOTES not in known:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (known, TRACKER_NOTES)))
    os.environ |= {"LAUNCHER_ATTEMPT": str(attempt), "LAUNCHER_PID": str(os.getpid()), "OMP_NUM_THREADS": _threads(placement.nproc)}
    _choose_interface(job)
    killed, heard = evidence.memory_kills(), listening.listening(run.url, stage, attempt, job, announce.announcer(job))
    with scratch.folder("ranks-") as logs, node_folder.shared() as left, heard as words, deferred_writes.taking_notes():
        config = _launch_config(placement, logs, met)
        _quiet_elastic()
        signals.block_in_children()
        lost, ends = "", dict[int, int]()
        try:
            lost, ends = _launch(config, arguments, job, stop, met)
        except StopRequested as early:
            for rank in range(placement.nproc):
                run.record_exit(stage, attempt, job.node * placement.nproc + rank, early.exit_code, str(early))
        signals.install(stop)  # elastic's handlers raise; srun sends SIGTERM once the first node has ended
        # Deferred writes are carried out in order, so this summary appears after what the ranks could not write: a reader who sees it has all of this node.
        summary = exit_records.summary(job.node, placement.nproc, node_folder.exits(left))
        deferred_writes.note(f"how the ranks of node {job.node} ended", run.attempt_url(stage, attempt, f"node-{job.node}.json"), summary)
        evidence.write(run, stage, attempt, job.node, ends, killed, words)
    return _end_together(placement, run, stage, attempt, met, lost)


def _end_together(placement: Placement, run: RunFolder, stage: str, attempt: int, met: Meeting | None, lost: str) -> tuple[int, str]:
    """Code and reason of an attempt whose ranks on this node have ended.

    Node 0 reads the records and tells the other nodes the outcome. A node that hears nothing from node 0 reads the records itself, but only a few of them.
    """
    if met is not None and met.job.node and not lost and (told := met.hear(2 * _PEERS_S)) is not None:
        met.close()
        return told
    few = _FEW if placement.job.node else None
    records, complete = run.wait_for_records(stage, attempt, placement.size, _LOST_S if lost else _PEERS_S if met else 0, few)
    code, reason = exit_records.root_cause(records, placement.size)
    if met is not None and code == ExitCode.CRASH and not placement.job.node and (silent := met.silent()):
        reason = f"{silent}; {reason}"
        if not complete:
            ledger.note_lost(run, stage, attempt, silent)
    if placement.job.node == 0 and (complete or met is None):
        ledger.write_end(run, stage, attempt, ledger.ending(code, reason, records))
    if met is not None:
        if not placement.job.node:
            met.tell(code, reason)
        met.close()
    return code, f"{lost}; {reason}" if lost and code == ExitCode.CRASH else reason


def _choose_interface(job: Job) -> None:
    """Tell gloo which network interface reaches the other nodes. By itself it takes the interface that the host's name resolves to, which may be the loopback."""
    if job.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # needs no name service and crosses no network
        return
    host, _ = interfaces.split(job.rendezvous)
    if not environment.text("GLOO_SOCKET_IFNAME") and interfaces.is_loopback(socket.gethostname()) and (name := interfaces.towards(host)):
        log.warning(
            "%s resolves to the loopback interface: gloo uses %s, through which node 0 is reached (GLOO_SOCKET_IFNAME)", socket.gethostname(), name
        )
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _launch_config(placement: Placement, logs: str, met: Meeting | None) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    job, one_node = placement.job, placement.nodes == 1
    host = interfaces.split(job.rendezvous)[0] if met else ""
    return LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.nproc,
        run_id=met.start if met else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=met.place if met else "127.0.0.1:0",
        # Given explicitly: elastic would guess it by comparing host names, and where nodes share a name, nobody would host the store.
        rdzv_configs={"is_host": job.node == 0, "timeout": RENDEZVOUS_S},
        local_addr="127.0.0.1" if one_node else (host if job.node == 0 else job.address) or None,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=",".join(number.name for number in signals.STOP_SIGNALS),
        log_line_prefix_template="[rank ${rank}] ",
        logs_specs=DefaultLogsSpecs(log_dir=logs, tee=Std.ALL if job.id else Std.NONE),
        **_shutdown_timeout(),
    )


def _launch(config: LaunchConfig, arguments: list[str], job: Job, stop: StopFlag, met: Meeting | None) -> tuple[str, dict[int, int]]:
    """Start the ranks and wait until they have ended, or are ended because a peer is lost; returns what is known of that loss, which is mostly nothing, and
    how the processes of ranks of this node ended that failed first: a code, or a signal as a negative number.

    Raises:
        LostPeerError: the nodes did not meet, so no rank was started.
        StopRequested: a stop signal came before any rank was started.
    """
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError, RendezvousTimeoutError
    from torch.distributed.launcher.api import elastic_launch

    def too_early(number: int, frame: FrameType | None) -> None:
        stop.handle(number, frame)
        raise StopRequested(f"{signals.signal.Signals(number).name} before the ranks were started")

    ends: dict[int, int] = {}
    try:
        for number in signals.STOP_SIGNALS:
            signals.signal.signal(number, too_early)  # elastic's handlers take over once there are ranks
        if stop.received:
            too_early(stop.received, None)
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:  # the ranks' own records say more
            ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as error:
        stop.received = error.sigval
    except RendezvousTimeoutError as error:
        who = ", ".join(f"node {node}" for node in met.missing()) if met and not job.node else ""
        raise LostPeerError(
            f"the {job.nodes} nodes of job {job.run_id} did not meet at {config.rdzv_endpoint} within {RENDEZVOUS_S} s: {who or 'one'} did not start, or "
            "cannot reach it."
        ) from error
    except (RendezvousConnectionError, RendezvousClosedError, DistNetworkError, DistStoreError) as error:
        if job.nodes == 1:
            raise
        what = f"node 0's rendezvous at {config.rdzv_endpoint} went away ({type(error).__name__})"
        return f"{what}: its launcher was killed, or the network between the nodes is broken", ends
    return "", ends


def begin(placement: Placement, run: RunFolder, stage: str, start: str = "", rendezvous: str = "") -> int:
    """Begin a new attempt in the ledger and return its number; called on node 0.

    Args:
        start: id of this start; empty for a single node.
        rendezvous: host:port where the nodes meet.

    Raises:
        DivergedError: this job has crashed, or was stopped, too often in a row; see ``ledger.refuse_a_crash_loop``.
    """
    job = placement.job
    retries = environment.whole("LAUNCHER_RETRIES", RETRIES) if placement.retries is None else placement.retries
    ledger.refuse_a_crash_loop(run, stage, job.restart, retries, ledger.STOPS if placement.trains else None)
    facts = {"start": start, "rendezvous": rendezvous} if start else {}
    saved = ledger.newest_checkpoint(run, stage)
    return run.begin_attempt(stage, size=placement.size, job=job.id, restart=job.restart, run_id=job.run_id, saved=saved, **facts)


def _begin_together(placement: Placement, run: RunFolder, stage: str, stop: StopFlag) -> tuple[int, Meeting | None]:
    """Number of the attempt that this node takes part in, and the meeting with the other nodes: node 0 begins the attempt and tells them.

    Raises:
        LostPeerError: node 0 did not begin.
        StopRequested: a stop signal came while this node waited.
    """
    job = placement.job
    if job.nodes == 1:
        return begin(placement, run, stage), None

    def recorded() -> str:
        newest = next(ledger.newest_first(run, stage), None)
        return newest.rendezvous if newest is not None and newest.run_id == job.run_id and not newest.closed else ""

    if job.node:
        found = meeting.join(job, stage, stop, recorded)
    else:
        found = meeting.host(job, lambda start, place: begin(placement, run, stage, start, place))
    return found.attempt, found


def _shutdown_timeout() -> dict[str, int]:
    """The launch option that gives stopped ranks SHUTDOWN_S to save. torch 2.11 has no such option; there this replaces the default of 30 s in torch itself."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return {"shutdown_timeout": signals.SHUTDOWN_S}
    assert PContext.close.__defaults__ in ((None, 30), (None, signals.SHUTDOWN_S)), "torch's PContext.close(death_sig, timeout) has changed"
    PContext.close.__defaults__ = (None, signals.SHUTDOWN_S)
    return {}


def _import_quietly() -> None:
    """Import torch with its C++ logging limited to errors: at its usual level it prints stack frames for every peer that ends. Ranks keep their own level."""
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        import torch  # noqa: F401 (torch reads the level once, at import)

        del os.environ["TORCH_CPP_LOG_LEVEL"]


def _quiet_elastic() -> None:
    """Silence elastic's traceback for every failed rank: our ranks say in one line what happened, and the exit records keep the rest."""
    quiet = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")
    for name in [*quiet, *(known for known in logging.root.manager.loggerDict if known.startswith(quiet))]:  # some have a level of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
