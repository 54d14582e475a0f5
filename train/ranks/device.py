"""The device of a rank, its process group, and the dtype in which matrix products are fast on it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import resource
from datetime import timedelta

import torch
import torch.distributed as dist

from infra import environment, storage, stored
from infra.run_folder import RunFolder
from infra.run_records import PrecisionChoice
from infra.world import World
from train.config_encode import Precision
from train.machine.rates import DTYPES, Options, matmul_rate, probe

log = logging.getLogger(__name__)

BF16_WORTH_IT = 1.3
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_COLLECTIVE_TIMEOUT = timedelta(minutes=10)
_PATIENT_TIMEOUT = timedelta(hours=12)
"""For collectives between ranks that work for different times: at a stage's end the main rank may merge or export for hours, and some ranks read checkpoints more
slowly than others."""
_patient: dist.ProcessGroup | None = None


def keep_memory() -> None:
    """Let malloc keep freed memory instead of returning it to the kernel. For CPUs: every training step frees and allocates the same large blocks, and the page
    faults would cost up to a third of the step (DECISIONS.md). Works with glibc only; otherwise nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_TOP_PAD, 1 << 27)


def set_up(world: World) -> torch.device:
    """Choose this rank's device, and join the process group (NCCL on GPUs, gloo on CPUs)."""
    global _patient
    if torch.cuda.is_available():
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_memory()
        torch.set_num_threads(environment.threads(torch.get_num_threads()))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore() if world.size == 1 else None
        _allow_many_files()
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=_COLLECTIVE_TIMEOUT)
        _patient = dist.new_group(backend="gloo", timeout=_PATIENT_TIMEOUT)
    return device


def _allow_many_files() -> None:
    """Raise this process's limit of open files as far as allowed: each gloo group has a connection to every other rank, and the usual limit is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a container may refuse the limit that it reports as allowed
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def patient_group() -> dist.ProcessGroup | None:
    """The process group for collectives that may wait longer than those of training. None, which means the default group, before ``set_up`` was called."""
    return _patient


def wait_for_all() -> None:
    """Barrier at the end of a stage: no rank ends while another still needs it, even if the main rank merges or exports for hours."""
    if dist.is_initialized():
        dist.barrier(_patient)


def leave_group() -> None:
    """Destroy the process group. Only at the end of the process, because DeepSpeed keeps a reference to the first group that it was given."""
    global _patient
    _patient = None
    if dist.is_initialized():
        dist.destroy_process_group()


def matrix_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Measure how many floating-point operations a second large matrix products reach in this process: the peak for the MFU. Takes a fraction of a second."""
    size = (8192, 8192, 8192) if device.type == "cuda" else (512, 512, 512)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # the random matrices must not change the state of the generators
        return 1e9 * matmul_rate(dtype, Options(device.type, seconds=0.1, runs=3), size).value


def branch_dtype(wanted: Precision, device: torch.device, run: RunFolder, world: World) -> torch.dtype:
    """The dtype of the large matrix products. 'auto' is decided once for a run, by a measurement, and stored in precision.json, so that a resumed run computes
    the same. Collective."""
    if wanted != "auto":
        return DTYPES[wanted]
    choice = [""]
    if world.is_main:
        url = run.at("precision.json")
        if not storage.exists(url):
            with torch.random.fork_rng(devices=[]):  # the probe's random matrices must not change the initial weights
                rates = probe(1.0) if device.type == "cpu" else {"fp32": 1.0, "bf16": 2.0}
            found = "bf16" if rates["bf16"] > BF16_WORTH_IT * rates["fp32"] else "fp32"
            text = json.dumps({"precision": found, "gflops": rates}, indent=2, sort_keys=True, allow_nan=False) + "\n"
            if storage.create_once(url, text.encode()):  # another launcher of the run may have probed meanwhile
                log.info(
                    "precision %s: matrix products run at %s GFLOP/s", found, ", ".join(f"{round(rate)} ({kind})" for kind, rate in rates.items())
                )
        choice = [stored.read(url, PrecisionChoice)["precision"]]
    if world.size > 1:
        dist.broadcast_object_list(choice, group=_patient)  # over gloo, which notices at once if the main rank has failed
    return DTYPES[choice[0]]
