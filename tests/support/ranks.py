"""Run a function of a test module in several gloo processes and collect what each returns.

The processes are forks of one that has imported torch, DeepSpeed and our engines, once for each pytest worker: four ranks that import them take 15 s of two cores.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import inspect
import json
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
_IMPORTED = (
    "torch",
    "torch._dynamo",
    "deepspeed",
    "numba",
    "streaming",
    "boto3",
    "train.engines.zero.construction",
    "train.optimizer.adamw_cpu",
    "train.stages.dalle",
)
_SERVERS: dict[int, subprocess.Popen[str]] = {}
"""By the process that started it: a fork of a test process has none of its own yet."""


def run_in_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` in ``size`` fresh processes with a process group; results by rank.

    The function stands at the top level of a test module, which each process loads from its file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if os.environ.get("TESTS_FORK_RANKS"):  # .ci/mutants.py has planted a fault in this very process, which runs one thread
            codes = _run_forks(function, size, scratch, arguments)
        else:
            Path(scratch, "arguments").write_bytes(pickle.dumps(arguments))
            asked = {"source": inspect.getsourcefile(function), "name": function.__name__, "size": size, "scratch": scratch}
            codes = _ask(asked | {"environment": dict(os.environ), "folder": os.getcwd()})
        failures = [path.read_text() for path in sorted(Path(scratch).glob("error-*"))]
        assert not any(codes), "\n".join(failures) or f"exit codes {codes}"
        return [pickle.loads(Path(scratch, f"result-{rank}").read_bytes()) for rank in range(size)]


def _ask(asked: dict[str, Any]) -> list[int]:
    """The exit codes of the ranks that this process's server forks."""
    server = _SERVERS.get(os.getpid())
    if server is None or server.poll() is not None:
        words = [sys.executable, __file__]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        _SERVERS[os.getpid()] = server
        atexit.register(_end, server, os.getpid())
    assert server.stdin is not None and server.stdout is not None
    try:
        print(json.dumps(asked), file=server.stdin, flush=True)
        return list(json.loads(server.stdout.readline()))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)  # its ranks as well
        server.wait()
        raise


def _end(server: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork of the test process ends
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        # An empty line, because forks may hold the other end of the pipe.
        server.communicate("\n", timeout=10)
    server.kill()


def _serve() -> None:
    """Fork the ranks of each line of the standard input, and answer with their exit codes."""
    # Not from the environment's site-packages, where other people's tests lie.
    sys.modules["tests"] = type(sys)("tests")
    sys.modules["tests"].__path__ = [str(ROOT / "tests")]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what ranks print does not go between the answers
    for name in _IMPORTED:
        importlib.import_module(name)
    for packed in (False, True):
        sys.modules["train.optimizer.adamw_cpu"].compiled(packed)  # out of numba's cache, which takes each process half a second
    gc.freeze()  # a collection in a rank would copy the pages of all that was imported
    for line in iter(sys.stdin.readline, ""):
        if not line.strip():
            break
        asked = json.loads(line)
        ranks = [_fork(asked, rank) for rank in range(asked["size"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        print(json.dumps(codes), file=answers, flush=True)


def _fork(asked: dict[str, Any], rank: int) -> int:
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        faulthandler.dump_traceback_later(_HANGS_S)  # who waits for whom, before the test's timeout ends it
        arguments = pickle.loads(Path(asked["scratch"], "arguments").read_bytes())
        _as_rank(getattr(_load(asked["source"]), asked["name"]), rank, asked["size"], asked["scratch"], arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run_forks(function: Callable[..., Any], size: int, scratch: str, arguments: tuple[Any, ...]) -> list[int]:
    """The exit codes of ranks that are forks of this process."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_as_rank, args=(function, rank, size, scratch, arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        time.sleep(0.01)
    for process in processes:  # one that waits for another, which has failed
        process.kill() if any(other.exitcode for other in processes) else process.join()
    return [process.exitcode or 0 for process in processes]


def _load(source: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _as_rank(function: Callable[..., Any], rank: int, size: int, scratch: str, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    from infra.world import World

    numbers = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_SIZE": size}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
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
    _serve()
