"""Prints the table of docs/compression.md: the model with 12 billion parameters on 128 machines of 8 GPUs, with and without compression between them:
``python -m train.experiments.compression_scale``. Uses the formulas of ``plan``; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from train.config import load_run
from train.planning import estimate
from train.planning.estimate import Setting
from train.planning.hardware import GPUS
from train.planning.states import Cluster

CLUSTER = Cluster(128, 8)
RANK = 896


@dataclass(frozen=True)
class Machine:
    """A kind of GPU, and the network of its machines."""

    gpu: str
    gbit_s: float
    """Rate of a whole machine's network, in one direction."""


MACHINES = (
    Machine("V100-16GB", 100),
    Machine("A100-80GB", 100),
    Machine("A100-80GB", 1600),
    Machine("H100-80GB", 100),
    Machine("H100-80GB", 400),
    Machine("H100-80GB", 3200),
)


def table() -> str:
    """The table, with one row for each kind of machine and each way of sending."""
    cfg = load_run("12B", ["zero.stage=3", "zero.sharding=node"])
    lines = [
        "| GPU | Gbit/s of a machine | gradients | MB a GPU | compute, s | inside, s | between, s | compressing, s | update, s | if overlapped, s |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for machine in MACHINES:
        gpu = replace(GPUS[machine.gpu], network_gb_s=machine.gbit_s / 8 / CLUSTER.gpus)
        for rank in (None, RANK):
            setting = Setting(cfg, CLUSTER, 3, "node", "half", 4, True, rank=rank)
            found, sent = estimate.times(setting, gpu), estimate.traffic(setting).outside
            times = (found.compute, found.inside, found.outside, found.compressing, found.expected, found.overlapped)
            way = "exact" if rank is None else f"rank {rank}"
            lines.append(
                f"| {machine.gpu} | {machine.gbit_s:g} | {way} | {sent / 1e6:,.0f} | " + " | ".join(f"{value:.2f}" for value in times) + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table())
