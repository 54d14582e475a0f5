"""Stages as jobs of a cluster: their shapes, what each waits for, and submitting one or all of them (``--on slurm``, ``--on k8s``, ``--chain``)."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from infra import k8s_submit, ledger, slurm_submit, storage
from infra.errors import ConfigError, ExitCode, ReportedError
from infra.job import JobSpec, Shape
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.run import lineage, places
from train.run.stage_table import STAGES


def job_spec(stage: str, cfg: RunConfig, run: RunFolder) -> JobSpec:
    """The job of a stage."""
    shape: Shape = "gang" if STAGES[stage].trains else "array" if STAGES[stage].shared else "node"
    return JobSpec(stage, cfg.run.name, storage.absolute(run.url), shape, cfg.cluster, STAGES[stage].gpus)  # the job starts in the repository


def show(stage: str, cfg: RunConfig, run: RunFolder, on: str, *, chain: bool) -> str:
    """What ``submit`` would send, and changes nothing."""
    stages = lineage.waiting(cfg, run) if chain else [stage]
    if on == "k8s":
        return "\n---\n".join(k8s_submit.shown(job_spec(name, cfg, run)) for name in stages)
    return "\n".join(
        slurm_submit.shown(job_spec(name, cfg, run), [f"JOB_{need}" for need in STAGES[name].needs if chain and need in stages]) for name in stages
    )


def submit(stage: str, cfg: RunConfig, run: RunFolder, on: str, *, chain: bool, command: str, going_on: str = "") -> None:
    """Claim the run folder and submit a stage, or with ``chain`` all that are not finished. Twice does no harm: what is queued stays alone.

    Raises:
        ConfigError: the scheduler refuses, or ``chain`` on Kubernetes, which has no dependencies between jobs.
    """
    if chain and on == "k8s":
        raise ConfigError("--chain --on k8s: Kubernetes starts jobs at once; apply one stage after the other, or use --on slurm.")
    if on == "k8s":
        k8s_submit.overlay(job_spec(stage, cfg, run))  # refused before anything is written
    cfg = places.claim(cfg, run, command, going_on)
    if not chain and places.finished(cfg, run, stage) and not STAGES[stage].repeats and not lineage.out_of_date(cfg, run, stage):
        print(f"{stage}: finished already ({run.at(stage, 'done.json')})")
        return
    ids: dict[str, str] = {}
    for name in lineage.waiting(cfg, run) if chain else [stage]:
        spec = job_spec(name, cfg, run)
        if on == "k8s":
            print(k8s_submit.submit(spec), end="")
            continue
        ids[name], new = slurm_submit.submit(spec, [ids[need] for need in STAGES[name].needs if need in ids])
        print(f"{name}: job {ids[name]}{'' if new else ' is in the queue already'}", flush=True)
    if on == "slurm":
        print(f"squeue --me; output in {slurm_submit.logs(spec)}; progress: python launcher.py status {shlex.quote(run.url)}")


@dataclass(frozen=True)
class Start:
    """One start of a SLURM job, as its batch script knows it."""

    job: str
    restart: int
    code: int
    """srun's exit code."""


def verdict(label: str, run: RunFolder, start: Start, retries: int) -> ledger.Verdict:
    """What the scheduler should do now that all launchers of a start have ended; the attempt's end is written down.

    Where the ledger has no attempt of this start (a wrong configuration, a node that fails its checks), srun's code decides.
    """
    attempts = ledger.read(run, label)
    if attempts and attempts[-1].run_id == f"{start.job}.{start.restart}":
        ledger.close(run, label, attempts[-1])
        return ledger.judge(attempts, ledger.newest_checkpoint(run, label), retries)
    if f"{start.job}.{start.restart}" in {attempt.run_id for attempt in attempts}:
        return ledger.Verdict(
            ExitCode.REQUEUE, f"attempt {attempts[-1].number}, by job {attempts[-1].run_id}, has begun since: this one has lost the work"
        )
    if start.code in set(ExitCode) - {ExitCode.CRASH}:
        return ledger.Verdict(start.code, "ended before an attempt was begun: see the log")
    if start.restart < retries:
        return ledger.Verdict(ExitCode.REQUEUE, f"crashed before an attempt was begun (restart {start.restart}; {retries} are made)")
    return ledger.Verdict(ExitCode.DIVERGED, f"crashed before an attempt was begun, {start.restart} restarts in a row")


class Judged(ReportedError):
    """The verdict on a stage's attempt, as an exit code."""

    def __init__(self, stage: str, found: ledger.Verdict) -> None:
        super().__init__(f"{stage}: {found.reason}")
        self.exit_code = ExitCode(found.code)
