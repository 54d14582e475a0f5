"""The agent: starts the ranks of a stage on this node through torch's elastic API, and turns their end into one exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import uuid
from dataclasses import dataclass

from infra import signals
from infra.errors import ConfigError
from infra.run_folder import RunFolder


@dataclass(frozen=True)
class Placement:
    """Where ranks run."""

    nproc: int
    """Ranks on each node."""
    nodes: int = 1
    """Nodes in all; each runs one agent."""
    rendezvous: str = ""
    """host:port of the first node; empty on one node."""
    run_id: str = ""
    """Equal on all nodes of a job, different for every job; empty on one node."""

    @property
    def size(self) -> int:
        return self.nproc * self.nodes


def _threads(nproc: int) -> str:
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // nproc))


def run_ranks(arguments: list[str], placement: Placement, run: RunFolder, stage: str) -> tuple[int, str]:
    """Run ``python ARGUMENTS`` as every rank of this node and wait for the end.

    Returns:
        Exit code and reason by the ranks' records (docs/contracts.md, section 1).
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if placement.nodes > 1 and not placement.rendezvous:
        raise ConfigError(f"{placement.nodes} nodes need a rendezvous host:port.")
    attempt = run.begin_attempt(stage)
    one_node = placement.nodes == 1
    os.environ |= {"LAUNCHER_ATTEMPT": str(attempt), "LAUNCHER_PID": str(os.getpid()), "OMP_NUM_THREADS": _threads(placement.nproc)}
    if one_node:
        # The loopback needs no name service and crosses no network.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=placement.nodes,
        max_nodes=placement.nodes,
        nproc_per_node=placement.nproc,
        run_id=placement.run_id or uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{_free_port()}" if one_node else placement.rendezvous,
        rdzv_configs={"is_host": True} if one_node else {},
        local_addr="127.0.0.1" if one_node else None,
        max_restarts=0,
        monitor_interval=0.1,
        signals_to_handle=",".join(number.name for number in signals.STOP_SIGNALS),
        **_shutdown_timeout(),
    )
    _quiet_elastic()
    signals.block_in_children()
    with contextlib.suppress(ChildFailedError, SignalException):  # the ranks' own records say more
        elastic_launch(config, sys.executable)(*arguments)
    return run.root_cause(stage, attempt, placement.size)


def _shutdown_timeout() -> dict[str, int]:
    """The option that gives stopped ranks SHUTDOWN_S to save. torch 2.11 has no such option: there the default of 30 s is replaced where it is written."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return {"shutdown_timeout": signals.SHUTDOWN_S}
    assert PContext.close.__defaults__ == (None, 30), "torch's PContext.close(death_sig, timeout) has changed"
    PContext.close.__defaults__ = (None, signals.SHUTDOWN_S)
    return {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quiet_elastic() -> None:
    """Elastic logs a traceback for every failed rank; ours say what happened in one line, and the exit records keep the rest."""
    for name in ("torch.distributed.elastic", "torch.distributed.launcher", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
