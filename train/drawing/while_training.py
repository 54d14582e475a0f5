"""Lets another process draw pictures while the transformer trains (section [samples]): beside training, or while training waits at an evaluation."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import IO

from infra.repository import REPOSITORY
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.planning import samples
from train.ranks import watchdog

log = logging.getLogger(__name__)

CORES = 4
"""With so many left over, 'auto' draws beside training."""
_OF_A_GPU_RANK = 3
"""Cores that a rank with a GPU keeps busy, without its loader's workers: its own, that of backward passes, that of checkpoints."""
_MOST_THREADS = 16
_LOOK_S = 0.05
_OF_THE_LIMIT = 0.5
"""Part of the watchdog's limit for an update that drawing at an evaluation may take: the other ranks wait in their next update meanwhile."""
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LAUNCHER_ATTEMPT")


def left_over(cores: int, ranks: int, threads: int, workers: int, *, gpu: bool) -> int:
    """CPU cores of this node that its ranks do not keep busy."""
    return max(0, cores - ranks * ((_OF_A_GPU_RANK if gpu else threads) + workers))


class Samples:
    """The main rank's side of it: starts a process for each drawing that is due, one at a time, and ends it when training ends."""

    def __init__(self, cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag, *, gpu: bool, threads: int) -> None:
        """
        Args:
            gpu: whether ranks train on GPUs.
            threads: of each rank's arithmetic.
        """
        section, self._run, self._stop = cfg.samples, run, stop
        self._device, self._every = section.device, section.every
        free = left_over(len(os.sched_getaffinity(0)), world.local_size, threads, cfg.data.workers, gpu=gpu)
        self.beside = section.where == "beside" or (section.where == "auto" and free >= CORES)
        self._threads = min(_MOST_THREADS, max(1, free)) if self.beside else max(1, threads)
        self._due = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._words: IO[bytes] | None = None
        if section.memory_gb and (needed := samples.memory(cfg)) > section.memory_gb * 1e9:
            log.warning("no pictures are drawn while training: that takes %.1f GB, and samples.memory_gb = %g", needed / 1e9, section.memory_gb)
            self._every = 0

    def look(self, saved: int, *, at_evaluation: bool) -> None:
        """Begin a drawing if one is due, or make it where training waits for it; to be called after each update.

        Args:
            saved: update of the newest complete checkpoint; 0: none has been written by this process.
            at_evaluation: whether this update ended with an evaluation.
        """
        if self._process is not None and self._process.poll() is not None:
            self._ended()
        if not self._every or saved < self._due or not saved or self._process is not None or not (self.beside or at_evaluation):
            return
        self._due = (saved // self._every + 1) * self._every
        self._start(saved)
        if not self.beside:
            with self._stop.during("the drawing of samples"):
                self._wait(_OF_THE_LIMIT * watchdog.LIMIT_S)

    def close(self) -> None:
        """End a drawing that is under way: the stage generate draws the last checkpoints again."""
        if self._process is not None and self._words is not None:
            self._process.kill()
            self._process.wait()
            self._words.close()
            self._process = self._words = None

    def _start(self, step: int) -> None:
        words = [sys.executable, str(REPOSITORY / "launcher.py"), "sample", self._run.url, "--step", str(step), *(["--aside"] if self.beside else [])]
        own = {name: value for name, value in os.environ.items() if name not in _RANKS}
        own |= {"OMP_NUM_THREADS": str(self._threads), "LAUNCHER_PID": str(os.getpid())}
        if self._device == "cpu":
            own["CUDA_VISIBLE_DEVICES"] = ""
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - open until the process has ended
        self._process = subprocess.Popen(words, env=own, stdin=subprocess.DEVNULL, stdout=self._words, stderr=self._words)

    def _wait(self, seconds: float) -> None:
        assert self._process is not None
        until = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < until and not self._stop:
            time.sleep(_LOOK_S)
        if self._process.poll() is None:
            if not self._stop:
                log.warning("samples: given up after %.0f s, because other ranks wait; samples.where = 'beside' lets training go on", seconds)
            self.close()
        else:
            self._ended()

    def _ended(self) -> None:
        """Say why, if it ended badly; training goes on."""
        assert self._process is not None and self._words is not None
        if self._process.returncode:
            self._words.seek(0)
            last = self._words.read().decode(errors="replace").strip().rpartition("\n")[2]
            log.warning("samples: the drawing ended with code %d: %s", self._process.returncode, last)
        self._words.close()
        self._process = self._words = None


def step_aside() -> None:
    """Let this process run only where nothing else wants to: the lowest priority, and the class of idle processes."""
    os.nice(19)
    with suppress(OSError):  # a kernel or a container without it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
