"""A program that measures an all-reduce within this node and prints the bus bandwidth as one line of JSON."""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from infra import scratch

_BYTES = {"nccl": 256 << 20, "gloo": 8 << 20}
_REPEATS = 5


def measure(rank: int, ranks: int, backend: str, folder: str) -> None:
    """Run one rank. Rank 0 writes the GB/s (2 (n - 1) / n times the bytes, divided by the median time) to ``folder``."""
    store = dist.FileStore(os.path.join(folder, "store"), ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    payload = torch.ones(_BYTES[backend] // 4, device=device)
    times = []
    for _ in range(_REPEATS + 1):
        if backend == "nccl":
            torch.cuda.synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(payload)
        if backend == "nccl":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    if rank == 0:
        median = sorted(times[1:])[_REPEATS // 2]  # without the first, which includes the time to connect
        with open(os.path.join(folder, "rate"), "w") as file:
            file.write(str(_BYTES[backend] * 2 * (ranks - 1) / ranks / median / 1e9))
    dist.destroy_process_group()


def main() -> None:
    """Measure with all GPUs, or with two processes on the CPU."""
    gpus = torch.cuda.device_count()
    backend, ranks = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    if backend == "gloo":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with scratch.folder("all-reduce-") as folder:
        # A forked process need not import torch again, but CUDA does not work after a fork.
        method = "spawn" if backend == "nccl" else "fork"
        mp.start_processes(measure, args=(ranks, backend, folder), nprocs=ranks, start_method=method)
        with open(os.path.join(folder, "rate")) as file:
            print(json.dumps({"backend": backend, "ranks": ranks, "gb_per_s": float(file.read())}))


if __name__ == "__main__":
    main()
