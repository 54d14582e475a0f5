"""Stands in for SLURM's commands where no cluster runs: linked as sbatch, squeue, scontrol and srun into a folder of the PATH.

Every call is a JSON line (argv and SBATCH_/LAUNCHER_ variables) in $STAND_IN/calls. srun starts its tasks on 127.0.0.1, 127.0.0.2, ... with the
variables of real tasks, passes USR2 on, ends all tasks after the first bad exit (--kill-on-bad-exit), and exits with the highest code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

KILL_WAIT_S = 30.0
COMMANDS = ("sbatch", "squeue", "scontrol", "srun")


def install(folder: Path) -> dict[str, str]:
    """Link the commands into ``folder``/bin; returns the environment in which they are found."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return {"STAND_IN": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def calls(folder: Path, name: str) -> list[list[str]]:
    """Arguments of all calls of a command so far."""
    if not (folder / "calls").exists():
        return []
    found = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return [call["argv"][1:] for call in found if call["argv"][0] == name]


def environments(folder: Path, name: str) -> list[dict[str, str]]:
    """Their SBATCH_ and LAUNCHER_ variables."""
    found = [json.loads(line) for line in (folder / "calls").read_text().splitlines()]
    return [call["env"] for call in found if call["argv"][0] == name]


def batch_environment(folder: Path, nodes: int = 1, restart: int = 0, job: str = "4242") -> dict[str, str]:
    """What slurmd gives a batch script."""
    hosts = f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1"
    facts = {"SLURM_JOB_ID": job, "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": hosts, "SLURM_SUBMIT_DIR": str(Path(__file__).parents[2])}
    return facts | ({"SLURM_RESTART_COUNT": str(restart)} if restart else {})


def _srun(arguments: list[str]) -> int:
    options = dict(
        word.removeprefix("--").partition("=")[::2] for word in arguments if word.startswith("--") and "=" in word and "signal" not in word
    )
    first = next(i for i, word in enumerate(arguments) if not word.startswith("--"))
    nodes = int(options["nodes"])
    base = os.environ | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": str(nodes), "SLURM_STEP_NUM_TASKS": options["ntasks"]}
    base["SLURM_STEP_NODELIST"] = os.environ["SLURM_JOB_NODELIST"]
    heard: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))  # before there are tasks, to all of which it goes
    tasks = [
        subprocess.Popen(
            arguments[first:],
            env=base | {"SLURM_NODEID": str(i), "SLURM_PROCID": str(i), "SLURMD_NODENAME": f"127.0.0.{i + 1}"},
            start_new_session=True,
        )
        for i in range(nodes)
    ]

    deadline = 0.0
    while any(task.poll() is None for task in tasks):
        while heard:
            number = heard.pop()
            for task in tasks:
                task.send_signal(number)  # not to those that have ended
        bad = [task.returncode for task in tasks if task.returncode]
        if bad and not deadline and "--kill-on-bad-exit=1" in arguments:
            deadline = time.monotonic() + KILL_WAIT_S
            for task in tasks:
                if task.poll() is None:
                    task.terminate()
        if deadline and time.monotonic() > deadline:
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGKILL)
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


def main(name: str, arguments: list[str]) -> int:
    """Record the call and act as the command would."""
    folder = Path(os.environ["STAND_IN"])
    kept = {key: value for key, value in os.environ.items() if key.startswith(("SBATCH_", "LAUNCHER_"))}
    with (folder / "calls").open("a") as file:
        file.write(json.dumps({"argv": [name, *arguments], "env": kept}) + "\n")
    queue = folder / "queue"
    known = json.loads(queue.read_text()) if queue.exists() else {}
    if name == "srun":
        return _srun(arguments)
    if name == "scontrol" and arguments[0] == "show":
        print(f"JobId={arguments[2]} JobName=x\n   Requeue=1 Restarts={os.environ.get('JOB_RESTARTS', '0')} BatchFlag=1")
    if name == "squeue":
        wanted = next((word.removeprefix("--name=") for word in arguments if word.startswith("--name=")), "")
        print(f"{known[wanted]} PENDING Resources" if wanted in known else "" if wanted else os.environ.get("JOB_STATE", "RUNNING"), end="")
    if name == "sbatch":
        if (folder / "refuse").exists():
            print("sbatch: error: invalid partition specified: gpu", file=sys.stderr)
            return 1
        if "--test-only" in arguments:
            print("sbatch: Job 7 to start at 2026-11-29T12:00:00 using 8 processors on nodes n1 in partition gpu", file=sys.stderr)
            return 0
        job = next(word.removeprefix("--job-name=") for word in arguments if word.startswith("--job-name="))
        known[job] = str(1000 + len(known))
        queue.write_text(json.dumps(known))
        print(f"{known[job]};cluster")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
