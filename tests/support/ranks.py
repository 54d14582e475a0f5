"""Run a function of a test module in several gloo processes and collect what each returns. Starting processes is dear: give one group many cases."""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.root import ROOT

_HANGS_S = 3400


def run_in_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` in ``size`` fresh processes with a process group; results by rank.

    The function stands at the top level of a test module, which each process loads from its file.
    """
    if os.environ.get("TESTS_FORK_RANKS"):
        return _run_in_forks(function, size, arguments)
    source = inspect.getsourcefile(function)
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "arguments").write_bytes(pickle.dumps(arguments))
        base = os.environ | {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(source), function.__name__, scratch], env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank in range(size)
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
        failures = [path.read_text() for path in sorted(Path(scratch).glob("error-*"))]
        assert not any(codes), "\n".join(failures) or f"exit codes {codes}"
        return [pickle.loads(Path(scratch, f"result-{rank}").read_bytes()) for rank in range(size)]


def _run_in_forks(function: Callable[..., Any], size: int, arguments: tuple[Any, ...]) -> list[Any]:
    """The same in children of this process, which need not import torch and DeepSpeed again; for .ci/mutants.py, whose process runs one thread."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        processes = [context.Process(target=_in_fork, args=(function, rank, size, scratch, arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
            time.sleep(0.01)
        failures = [path.read_text() for path in sorted(Path(scratch).glob("error-*"))]
        for process in processes:  # one that waits for another, which has failed
            process.kill() if any(other.exitcode for other in processes) else process.join()
        assert not any(process.exitcode for process in processes), "\n".join(failures)
        return [pickle.loads(Path(scratch, f"result-{rank}").read_bytes()) for rank in range(size)]


def _in_fork(function: Callable[..., Any], rank: int, size: int, scratch: str, arguments: tuple[Any, ...]) -> None:
    numbers = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    _as_rank(function, scratch, arguments)


def _load(source: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _main(source: str, name: str, scratch: str) -> None:
    # Not from the environment's site-packages, where other people's tests lie.
    sys.modules["tests"] = type(sys)("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]
    faulthandler.dump_traceback_later(_HANGS_S)  # who waits for whom, before the test's timeout ends it
    _as_rank(getattr(_load(source), name), scratch, pickle.loads(Path(scratch, "arguments").read_bytes()))


def _as_rank(function: Callable[..., Any], scratch: str, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from infra.world import World

    torch.set_num_threads(1)
    world = World.from_env()
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(scratch, "store")), world.size), rank=world.rank, world_size=world.size)
    try:
        result = function(world, *arguments)
        Path(scratch, f"result-{world.rank}").write_bytes(pickle.dumps(result))
        if dist.is_initialized():  # a stage leaves the group itself
            dist.barrier()
    except BaseException:
        Path(scratch, f"error-{world.rank}").write_text(traceback.format_exc())
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
