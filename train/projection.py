"""How long the demo will take here: a probe of about 20 seconds with the real networks, before anything else runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from infra import storage
from infra.run_folder import RunFolder
from train.config import RunConfig

PROBE_S = 16.0
"""Seconds of measured work: this long for the dVAE and the transformer together, in as many processes as the demo uses."""
_OTHER_S = 60.0  # data, tokens, starts of processes: little, and much the same everywhere


def project(cfg: RunConfig, run: RunFolder, nproc: int) -> str:
    """Measure updates of both networks in ``nproc`` processes at once, and say what the unfinished stages will take."""
    stages = [name for name in ("dvae", "dalle") if run.done(name) is None]
    if not stages:
        return "projected time: about a minute (both trainings are finished)"
    command = [sys.executable, "-m", "train.projection_worker", run.config_url, str(nproc), str(PROBE_S / len(stages)), *stages]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // nproc))}
    root = Path(__file__).parent.parent
    print(f"probing this machine for about {PROBE_S + 6:.0f} seconds ...", flush=True)
    processes = [subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(nproc)]
    rates = [dict(zip(stages, map(float, process.communicate()[0].split()), strict=True)) for process in processes]
    seconds = {}
    for name in stages:
        fit = cfg.dvae_fit if name == "dvae" else cfg.dalle_fit
        samples_per_s = sum(rate[name] for rate in rates)
        seconds[name] = (fit.steps - _steps_done(run, name)) * fit.batch / samples_per_s
    total = sum(seconds.values()) * 1.05 + _OTHER_S  # 5 %: evaluation and checkpoints
    parts = ", ".join(f"{name} {value / 60:.1f}" for name, value in seconds.items())
    return f"projected time: {total / 60:.0f} minutes ({parts}, the rest {(total - sum(seconds.values())) / 60:.1f})"


def _steps_done(run: RunFolder, name: str) -> int:
    """Updates of the newest complete checkpoint."""
    files = storage.list_files(run.at(name, "checkpoints"))
    return max((int(file.split("/")[0].removeprefix("step-")) for file in files if file.endswith("/meta.json")), default=0)
