"""Runs a stage from the command line: resolves and shows the configuration, claims the run folder, and starts ranks or submits a job. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from infra import environment, scratch, signals
from infra.agent import Placement
from infra.commands import launcher
from infra.config import differences, to_json
from infra.errors import ConfigError, DataError, ExitCode, ReportedError, StopRequested
from infra.job import Job
from infra.progress import duration
from infra.repository import LAUNCHER
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train import attempt
from train.config import RunConfig, load_run, read_preset
from train.config_align import usual_steps
from train.run import lineage, places
from train.run.places import run_folder
from train.run.stage_table import STAGES, TRAINED, Stage, used_by
from train.verbs import doctor


class StageFailed(ReportedError):
    """A stage ended with a code other than 0. The message is the root cause, or empty if that was shown already."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = ExitCode(code)


def default_nproc(stage: Stage) -> int:
    """One process for each GPU; on a machine without GPUs two, or one if it has a single core."""
    if not stage.parallel:
        return 1
    visible = environment.visible_devices()
    gpus = len(visible) if visible is not None else len(list(Path("/dev").glob("nvidia[0-9]*")))
    return gpus or min(2, len(os.sched_getaffinity(0)))


def stage(
    name: str,
    preset: str,
    overrides: list[str],
    *,
    on: str,
    nproc: int,
    dry_run: bool,
    worker: bool,
    stop: StopFlag,
    share: str = "",
    chain: bool = False,
    restarts: int = 0,
    go_on: bool = False,
) -> None:
    """Run one stage in this process, or start several ranks for it and wait for them; see ``launcher.py``.

    Raises:
        ReportedError: carries an exit code of docs/contracts.md, section 1.
    """
    cfg = load_run(preset, overrides)
    entry = STAGES[name]
    if entry.optional and name not in used_by(cfg):
        if any(word.startswith(f"{name}_fit.steps=") for word in overrides):
            raise ConfigError(
                f"{name}_fit.steps = 0: a run with it has no stage '{name}'; give it updates, or leave the key out for the usual number."
            )
        overrides = [*overrides, f"{name}_fit.steps={usual_steps(cfg.dalle_fit.steps)}"]
        cfg = load_run(preset, overrides)
    run = run_folder(cfg)
    if worker:
        signals.die_with_parent()
        attempt.exit_soon(attempt.guarded(name, cfg, run, World.from_env(), stop, environment.whole("LAUNCHER_ATTEMPT")))
        return
    if share:
        os.environ["LAUNCHER_SHARE"] = share  # ranks inherit it
    attempt.labelled(name)  # refused before anything is written
    _check_target(on)
    _check_options(nproc, restarts, on, chain=chain)
    nproc = nproc or default_nproc(entry)
    if not entry.parallel and nproc > 1:
        raise ConfigError(f"--nproc {nproc}: stage '{name}' runs in one process.")
    if go_on and not entry.trains:
        raise ConfigError(f"--go-on: '{name}' does not train; a change point belongs to {', '.join(TRAINED)}.")
    going_on = name if go_on or (entry.optional and _is_new(name, cfg, run)) else ""
    if on != "local" or chain:
        _submit(name, cfg, run, [preset, *overrides], on, chain=chain, dry_run=dry_run, going_on=going_on)
        return
    if dry_run:
        print(describe(cfg, preset), end="", flush=True)
        print("# command\n" + shlex.join([sys.executable, str(LAUNCHER), name, preset, *overrides, *_options(nproc, restarts)]))
        if nproc > 1 or restarts:
            print(f"# each of the ranks ({nproc})\n" + shlex.join([sys.executable, str(LAUNCHER), name, run.config_url, "--worker"]))
        print(entry.previewed(cfg), end="")
        return
    if environment.text("LAUNCHER_PID"):
        signals.die_with_parent()
    _run(name, cfg, run, shlex.join(["python", "launcher.py", name, preset, *overrides]), nproc, restarts, stop, going_on)


def _run(name: str, cfg: RunConfig, run: RunFolder, command: str, nproc: int, restarts: int, stop: StopFlag, going_on: str) -> None:
    started, entry = time.monotonic(), STAGES[name]
    of_demo = bool(environment.text("LAUNCHER_PID"))  # asked now, because an agent sets it for its ranks
    scratch.sweep()
    cfg, differs = places.looked_at(cfg, run, command, going_on)
    if places.finished(cfg, run, name) and not entry.repeats and not _out_of_date(name, cfg, run):
        if differs:
            places.claim(cfg, run, command, going_on)
        print(f"{name}: finished already ({run.at(name, 'done.json')})")
        return
    run.refuse_links(name, *(made.partition("/")[0] for made in entry.makes))
    job = Job.from_env()
    if job.nodes > 1 and not entry.parallel:
        raise ConfigError(f"stage '{name}' runs in one process, and this job has {job.nodes} nodes.")
    fit = doctor.fit(run, job) if job.id else contextlib.nullcontext()
    with fit, run.lock(attempt.labelled(name), job, stop) if job.node == 0 else contextlib.nullcontext() as held:  # node 0's holds for all
        _refuse_if_stopped(stop)
        if differs:  # a launcher that was refused the stage has changed nothing of the run
            cfg = places.claim(cfg, run, command, going_on)
        code, reason = attempt.execute(name, cfg, run, Placement(nproc, job, trains=entry.trains), stop, restarts)
    if held is not None and held.lost:  # whatever the ranks came to
        code, reason = ExitCode.REQUEUE, held.lost
    if code != ExitCode.DONE:
        raise StageFailed(code, reason if reason.startswith(f"{name}: ") else f"{name}: {reason}")
    print(f"{name}: done in {_times((run.done(name) or {}).get('seconds'), time.monotonic() - started)}", flush=True)
    if entry.trains and not of_demo:  # which comes to them by itself
        for other in used_by(cfg):
            if old := lineage.out_of_date(cfg, run, other):
                print(f"{other}: out of date ({old}); {lineage.remedy(run, other)}", flush=True)


def _is_new(name: str, cfg: RunConfig, run: RunFolder) -> bool:
    """Whether an optional stage that has not begun is given other values than the run has: then nothing was made with those."""
    if run.stored() is None or places.has_begun(run, name):
        return False
    return bool(getattr(load_run(run.url, []), f"{name}_fit") != getattr(cfg, f"{name}_fit"))


def _times(own: float | None, elapsed: float) -> str:
    """How long a stage took: its own seconds over all attempts, as in the report, followed by the wall-clock time of this attempt."""
    if own is None:
        return duration(elapsed)
    if own > elapsed:
        return f"{duration(own)} in all attempts ({duration(elapsed)} in this one, with the start of its processes)"
    return f"{duration(own)} ({duration(elapsed)} with the start of its processes)"


def _out_of_date(name: str, cfg: RunConfig, run: RunFolder) -> bool:
    """Whether a finished stage was made from older weights than those that exist now, so that it must run again.

    Raises:
        DataError: it is a training stage, whose result is not thrown away without being asked for.
    """
    old = lineage.out_of_date(cfg, run, name)
    if old and STAGES[name].trains:
        raise DataError(f"{name} is out of date: {old}. It is not trained anew unasked: {lineage.remedy(run, name)}, or go back to those.")
    if old:
        print(f"{name}: out of date ({old}); made again", flush=True)
    return bool(old)


def _check_target(on: str) -> None:
    if on not in ("local", "slurm", "k8s"):
        raise ConfigError(f"--on {on}: accepted are local, slurm and k8s.")


def _check_options(nproc: int, restarts: int, on: str, *, chain: bool) -> None:
    """Refuse options that jobs would not follow."""
    if nproc and (on != "local" or chain):
        raise ConfigError(f"--nproc {nproc}: a job starts a process for each GPU of its nodes; set cluster.gpus and cluster.nodes.")
    job = Job.from_env().id
    if restarts and (on != "local" or chain or job):
        raise ConfigError(f"--restarts {restarts}: {f'job {job} is' if job else 'jobs are'} started again by the scheduler; set cluster.retries.")


def _submit(name: str, cfg: RunConfig, run: RunFolder, words: list[str], on: str, *, chain: bool, dry_run: bool, going_on: str = "") -> None:
    if on == "local":
        raise ConfigError("--chain: submits all stages to a scheduler; on this machine, 'launcher.py demo' runs them in turn.")
    from train.run import cluster

    cluster.check(name, cfg, run, chain=chain)
    if dry_run:
        print(describe(cfg, words[0]), end="", flush=True)
        print(cluster.show(name, cfg, run, on, chain=chain))
        return
    cluster.submit(name, cfg, run, on, chain=chain, command=shlex.join(["python", "launcher.py", name, *words]), going_on=going_on)


def verdict(name: str, preset: str, overrides: list[str]) -> None:
    """Tell a scheduler, through the exit code, what to do after an attempt at a stage; see ``train/run/cluster.py``.

    Raises:
        Judged: carries any code except 0.
    """
    from infra.job import RETRIES
    from train.run.cluster import Judged, Start
    from train.run.cluster import verdict as judge

    run = run_folder(load_run(preset, overrides))
    restart, code = environment.whole("SLURM_RESTART_COUNT", 0), environment.whole("LAUNCHER_CODE", ExitCode.CRASH)
    start = Start(environment.text("SLURM_JOB_ID"), restart, code)
    found = judge(attempt.labelled(name), run, start, environment.whole("LAUNCHER_RETRIES", RETRIES))
    if found.code != ExitCode.DONE:
        raise Judged(name, found)
    print(f"{name}: {found.reason}")


def _refuse_if_stopped(stop: StopFlag) -> None:
    if stop:
        raise StopRequested(f"{signals.signal.Signals(stop.received or 0).name} before the start; nothing was begun.")


def command(name: str, run: RunFolder, nproc: int, restarts: int = 0) -> list[str]:
    """The command line that runs a stage of an existing run folder again."""
    return [sys.executable, str(LAUNCHER), name, run.url, *_options(nproc, restarts)]


def _options(nproc: int, restarts: int) -> list[str]:
    return ["--nproc", str(nproc)] + (["--restarts", str(restarts)] if restarts else [])


def describe(cfg: RunConfig, preset: str) -> str:
    """The resolved configuration as TOML-like lines; values that differ from the preset are marked."""
    tree, _ = read_preset(preset)
    base = json.loads(to_json(RunConfig.model_validate_json(json.dumps(tree))))
    ours = json.loads(to_json(cfg))
    ours["run"] |= {"name": cfg.run.name, "root": cfg.run.root}  # which are not stored
    base["run"] |= {"name": tree.get("run", {}).get("name", cfg.run.name), "root": tree.get("run", {}).get("root", "runs")}
    changed = {line.split(": ")[0]: line.split(": ", 1)[1] for line in differences(base, ours)}
    lines = []
    for section, values in ours.items():
        lines.append(f"[{section}]")
        for key, value in values.items():
            mark = changed.get(f"{section}.{key}")
            lines.append(f"{key} = {json.dumps(value)}" + (f"    # preset: {mark.split(' -> ')[0]}" if mark else ""))
    return "\n".join(lines) + "\n"


def demo(preset: str, overrides: list[str], *, on: str, nproc: int, dry_run: bool, stop: StopFlag, restarts: int = 0) -> None:
    """Run all stages in turn, each in a process of its own; see ``launcher.py``."""
    cfg = load_run(preset, overrides)
    run = run_folder(cfg)
    _check_target(on)
    _check_options(nproc, restarts, on, chain=False)
    if on != "local":
        _submit("report", cfg, run, [preset, *overrides], on, chain=True, dry_run=dry_run)
        return
    if dry_run:
        print(describe(cfg, preset), end="")
        print(
            "# commands\n"
            + "\n".join(shlex.join(command(name, run, nproc or default_nproc(entry), restarts)) for name, entry in used_by(cfg).items())
        )
        return
    cfg = places.claim(cfg, run, shlex.join(["python", "launcher.py", "demo", preset, *overrides]))
    from train.planning.demo_time import project

    projection = project(cfg, run, nproc or default_nproc(STAGES["dalle"]))
    print(projection, flush=True)
    started = time.monotonic()
    stages = used_by(cfg)
    for position, (name, entry) in enumerate(stages.items(), 1):
        print(f"[{position}/{len(stages)}] {name}{projection.to_go()}", flush=True)
        _refuse_if_stopped(stop)
        began = time.monotonic()
        _run_child(command(name, run, (nproc or default_nproc(entry)) if entry.parallel else 1, restarts), stop)
        projection.took(name, time.monotonic() - began)
    work = sum(float((run.done(name) or {}).get("seconds", 0.0)) for name in stages)
    print(f"done in {duration(time.monotonic() - started)}; the stages' own work, in all attempts, took {duration(work)}")
    print(f"report       {run.at('report.html')}")
    print(f"pictures     {run.at('generate', 'grid.png')}")
    print(f"tensorboard  {run.at('tensorboard')}    ({launcher('tensorboard', run.url)})")


def _run_child(arguments: list[str], stop: StopFlag) -> None:
    """Run a stage's launcher as a child, pass stop signals on to it, and end with its code."""
    variables = os.environ | {"LAUNCHER_PID": str(os.getpid())}
    child = subprocess.Popen(arguments, env=variables, start_new_session=True)
    passed = False
    while True:
        try:
            code = child.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            if stop.received and not passed:
                child.send_signal(stop.received)
                passed = True
    if code < 0:
        raise StageFailed(ExitCode.CRASH, f"{arguments[2]}: killed by signal {-code}; run the same command again to go on.")
    if code:
        raise StageFailed(code, "")  # its launcher has printed the reason, which should remain the last line
