"""Sums over ranks on this machine: a bucket of gradients, and the step's message. ``launcher.py bench comm``

On CUDA with NCCL over all GPUs, on a CPU with gloo over two processes.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from train.bench.harness import Result, main, start
from train.machine.rates import Figure, Options, copy_rate, threads

BUCKET, MESSAGE = 16_000_000, 1_000
"""Numbers: of fp32 in a bucket of gradients, and of fp64 in the message that every update sends."""
_SIZES = {"bucket": (BUCKET, torch.float32), "message": (MESSAGE, torch.float64)}
_CPU_RANKS = 2


def run(options: Options) -> Result:
    """Measure both between as many processes as there are GPUs."""
    return measured(options, torch.cuda.device_count() if options.device == "cuda" else _CPU_RANKS)


def measured(options: Options, ranks: int) -> Result:
    """The same between so many processes of this machine."""
    backend = "nccl" if options.device == "cuda" else "gloo"
    result = start("comm", "Sums over ranks", options, ranks=ranks, backend=backend, bucket_megabytes=4 * BUCKET / 1e6, message_numbers=MESSAGE)
    with threads(1):
        result.floor["copying memory"] = copy_rate(replace(options, runs=min(options.runs, 3)))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(ranks, folder, backend, options.seconds, options.runs), nprocs=ranks)  # type: ignore[no-untyped-call]
        found: dict[str, list[float]] = json.loads(Path(folder, "seconds.json").read_text())
    # Every rank sends and receives 2 (n - 1) / n of the bytes, whatever the algorithm: NCCL's "bus bandwidth".
    sent = 4 * BUCKET * 2 * (ranks - 1) / max(1, ranks)
    rates = sorted(sent / seconds / 1e9 for seconds in found["bucket"])
    result.measured["all-reduce of a bucket"] = Figure(statistics.median(rates), rates[0], rates[-1], "GB/s", len(rates))
    times = sorted(1e6 * seconds for seconds in found["message"])
    result.measured["the step's message"] = Figure(statistics.median(times), times[0], times[-1], "microseconds", len(times))
    result.ratio("all-reduce over copying memory", "all-reduce of a bucket", "copying memory")
    result.notes.append(
        "Rate: 2 (n - 1) / n times the bytes of the bucket over the time, as NCCL's tests count. Ranks are processes of one machine: no network."
    )
    return result


def _rank(rank: int, ranks: int, folder: str, backend: str, seconds: float, runs: int) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "gloo":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {name: _seconds(torch.zeros(count, dtype=dtype, device=device), seconds, runs) for name, (count, dtype) in _SIZES.items()}
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _seconds(values: torch.Tensor, seconds: float, runs: int) -> list[float]:
    """Seconds of one sum, in each of some runs. Ranks make equally many: the first says how many."""

    def summed(times: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    summed(1)
    times = torch.tensor([max(1.0, seconds / runs / summed(1))], device=values.device)
    dist.broadcast(times, 0)
    return [summed(int(times)) for _ in range(runs)]


if __name__ == "__main__":
    main(run)
