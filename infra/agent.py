"""The agent: starts the ranks of a stage on this node through torch's elastic API, and turns their end into one exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING

from infra import deferred_writes, environment, ledger, scratch, signals
from infra.errors import ExitCode, LostPeerError, StopRequested
from infra.job import RETRIES, Job
from infra.run_folder import RunFolder
from infra.signals import StopFlag

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.launcher.api import LaunchConfig

TRACKER_NOTES = "ignore:resource_tracker:UserWarning"
"""What Python's own tracker says of segments of shared memory that a killed rank left, which our claims remove (data_pipeline/loading/shared_memory.py)."""
_RENDEZVOUS_S = 600  # images are pulled and environments loaded at different speeds
_LOOK_S = 5  # at a node 0 that may not be there yet
_ATTEMPT = "attempt"  # the key of its number in the store
_PEERS_S = 60  # nodes end within seconds of each other, or not at all
_LOST_S = 10  # without node 0, whose ranks died with it


@dataclass(frozen=True)
class Placement:
    """Where ranks run."""

    nproc: int
    """Ranks on each node."""
    job: Job = field(default_factory=Job)
    """This node's place in the scheduler's job."""
    retries: int | None = None
    """Crashes in a row that are retried; None: as LAUNCHER_RETRIES says, or RETRIES."""

    @property
    def nodes(self) -> int:
        return self.job.nodes

    @property
    def size(self) -> int:
        return self.nproc * self.nodes


def _threads(nproc: int) -> str:
    return str(environment.threads(max(1, len(os.sched_getaffinity(0)) // nproc)))


def run_ranks(arguments: list[str], placement: Placement, run: RunFolder, stage: str, stop: StopFlag) -> tuple[int, str]:
    """Run ``python ARGUMENTS`` as every rank of this node and wait for the end. A stop signal goes to the ranks, and sets ``stop``.

    Returns:
        Exit code and reason by the ranks' records (docs/contracts.md, section 1).

    Raises:
        LostPeerError: the nodes of the job did not meet.
    """
    _import_quietly()
    attempt, _store = _begin_together(placement, run, stage, stop)
    job, one_node = placement.job, placement.nodes == 1
    known = os.environ.get("PYTHONWARNINGS", "")
    if TRACKER_NOTES not in known:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (known, TRACKER_NOTES)))
    os.environ |= {"LAUNCHER_ATTEMPT": str(attempt), "LAUNCHER_PID": str(os.getpid()), "OMP_NUM_THREADS": _threads(placement.nproc)}
    if one_node:
        # The loopback needs no name service and crosses no network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with scratch.folder("ranks-") as logs, deferred_writes.taking_notes():
        config = _launch_config(placement, logs)
        _quiet_elastic()
        signals.block_in_children()
        lost = ""
        try:
            lost = _launch(config, arguments, job, stop)
        except StopRequested as early:
            for rank in range(placement.nproc):
                run.record_exit(stage, attempt, job.node * placement.nproc + rank, early.exit_code, str(early))
        signals.install(stop)  # elastic's handlers raise; srun sends SIGTERM once the first node has ended
    if not one_node:
        run.wait_for_records(stage, attempt, placement.size, _LOST_S if lost else _PEERS_S)
    code, reason = run.root_cause(stage, attempt, placement.size)
    return code, f"{lost}; {reason}" if lost and code == ExitCode.CRASH else reason


def _launch_config(placement: Placement, logs: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    job, one_node = placement.job, placement.nodes == 1
    host = job.rendezvous.rpartition(":")[0]
    return LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.nproc,
        run_id=job.run_id or uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if one_node else job.rendezvous,
        # Said, not guessed: elastic compares names, and where nodes share one, nobody would host the store.
        rdzv_configs={"is_host": job.node == 0, "timeout": _RENDEZVOUS_S},
        local_addr="127.0.0.1" if one_node else (host if job.node == 0 else job.address) or None,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=",".join(number.name for number in signals.STOP_SIGNALS),
        log_line_prefix_template="[rank ${rank}] ",
        logs_specs=DefaultLogsSpecs(log_dir=logs, tee=Std.ALL if job.id else Std.NONE),
        **_shutdown_timeout(),
    )


def _launch(config: LaunchConfig, arguments: list[str], job: Job, stop: StopFlag) -> str:
    """Start the ranks and wait until they have ended, or are ended because a peer is lost; returns what is known of that loss, which is mostly nothing.

    Raises:
        LostPeerError: the nodes did not meet: no rank was started.
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

    try:
        for number in signals.STOP_SIGNALS:
            signals.signal.signal(number, too_early)  # elastic's handlers take over once there are ranks
        if stop.received:
            too_early(stop.received, None)
        with contextlib.suppress(ChildFailedError):  # the ranks' own records say more
            elastic_launch(config, sys.executable)(*arguments)
    except SignalException as error:
        stop.received = error.sigval
    except RendezvousTimeoutError as error:
        raise LostPeerError(
            f"the {job.nodes} nodes of job {job.run_id} did not meet at {config.rdzv_endpoint} within {_RENDEZVOUS_S} s: one did not start, or cannot reach it."
        ) from error
    except (RendezvousConnectionError, RendezvousClosedError, DistNetworkError, DistStoreError) as error:
        if job.nodes == 1:
            raise
        what = f"node 0's rendezvous at {job.rendezvous} went away ({type(error).__name__})"
        return f"{what}: its launcher was killed, or the network between the nodes is broken"
    return ""


def begin(placement: Placement, run: RunFolder, stage: str) -> int:
    """Number of a new attempt in the ledger, for node 0.

    Raises:
        DivergedError: this job has crashed too often in a row; see ``ledger.refuse_a_crash_loop``.
    """
    job = placement.job
    retries = environment.whole("LAUNCHER_RETRIES", RETRIES) if placement.retries is None else placement.retries
    ledger.refuse_a_crash_loop(run, stage, job.restart, retries)
    saved = ledger.newest_checkpoint(run, stage)
    return run.begin_attempt(stage, size=placement.size, job=job.id, restart=job.restart, run_id=job.run_id, saved=saved)


def _begin_together(placement: Placement, run: RunFolder, stage: str, stop: StopFlag) -> tuple[int, TCPStore | None]:
    """Number of the attempt that this node takes part in, and what keeps it open to the others.

    Node 0 begins it, and its own process tells the others through the store of the rendezvous: what a scheduler calls a start may have been called so
    before, as where a job is suspended and resumed, and what lies in the run folder may be of that one.

    Raises:
        LostPeerError: node 0 did not begin.
        StopRequested: a stop signal came while this node waited.
    """
    from torch.distributed import DistNetworkError, DistStoreError, TCPStore

    job = placement.job
    attempt = begin(placement, run, stage) if job.node == 0 else -1
    if job.nodes == 1:
        return attempt, None
    host, _, port = job.rendezvous.rpartition(":")
    if job.node:
        _wait_for_node_0(job, stage, stop)
    try:
        # Elastic finds node 0's store in the process, and shares it.
        store = TCPStore(host, int(port), is_master=job.node == 0, wait_for_workers=False, multi_tenant=True, timeout=timedelta(seconds=_PEERS_S))
        if job.node == 0:
            store.set(_ATTEMPT, str(attempt))
        return int(store.get(_ATTEMPT)), store
    except (DistNetworkError, DistStoreError) as error:
        what = "is the port taken, or the name another node's?" if job.node == 0 else "see the log of node 0."
        raise LostPeerError(
            f"node {job.node} of job {job.run_id} cannot use {job.rendezvous}, where node 0 meets the others ({error}): {what}"
        ) from error


def _wait_for_node_0(job: Job, stage: str, stop: StopFlag) -> None:
    """Until something listens there: torch's own waiting hears no stop signal, and shows frames for every attempt."""
    host, _, port = job.rendezvous.rpartition(":")
    deadline = time.monotonic() + _RENDEZVOUS_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_S).close()
            return
        except OSError as error:  # not yet there, or its name is not
            if stop.received:
                raise StopRequested(f"{stop.received.name} before node 0 had begun; nothing was begun here.") from error
            if time.monotonic() > deadline:
                raise LostPeerError(
                    f"node 0 of job {job.run_id} did not begin '{stage}' at {job.rendezvous} within {_RENDEZVOUS_S} s: see its log."
                ) from error
            time.sleep(1)


def _shutdown_timeout() -> dict[str, int]:
    """The option that gives stopped ranks SHUTDOWN_S to save. torch 2.11 has no such option: there the default of 30 s is replaced where it is written."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return {"shutdown_timeout": signals.SHUTDOWN_S}
    assert PContext.close.__defaults__ in ((None, 30), (None, signals.SHUTDOWN_S)), "torch's PContext.close(death_sig, timeout) has changed"
    PContext.close.__defaults__ = (None, signals.SHUTDOWN_S)
    return {}


def _import_quietly() -> None:
    """Import torch so that its C++ part reports errors alone in this process: it shows frames for every peer that ends. Ranks keep their own level."""
    if "TORCH_CPP_LOG_LEVEL" not in os.environ:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
        import torch  # noqa: F401 (reads the level once)

        del os.environ["TORCH_CPP_LOG_LEVEL"]


def _quiet_elastic() -> None:
    """Elastic logs a traceback for every failed rank; ours say what happened in one line, and the exit records keep the rest."""
    quiet = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run")
    for name in [*quiet, *(known for known in logging.root.manager.loggerDict if known.startswith(quiet))]:  # some have a level of their own
        logging.getLogger(name).setLevel(logging.CRITICAL)
