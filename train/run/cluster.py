"""Runs stages as jobs of a cluster: how many nodes each takes, what each waits for, and how they are submitted (``--on slurm``, ``--on k8s``, ``--chain``)."""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass

from infra import k8s_standing, k8s_submit, lease, ledger, slurm_submit, storage
from infra.commands import launcher
from infra.errors import ConfigError, DataError, ExitCode, ReportedError
from infra.job import JobSpec, Shape
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.config_compression import check_rank
from train.run import elastic, lineage, places, submitted_inputs
from train.run.stage_table import STAGES, TRAINED, used_by


def job_spec(stage: str, cfg: RunConfig, run: RunFolder) -> JobSpec:
    """The specification of a stage's job."""
    shape: Shape = "gang" if STAGES[stage].trains else "array" if STAGES[stage].shared else "node"
    return JobSpec(stage, cfg.run.name, storage.absolute(run.url), shape, cfg.cluster, STAGES[stage].gpus)  # the job starts in the repository


def _settled(spec: JobSpec, on: str) -> JobSpec:
    """A job whose namespace is known, where it has one."""
    return k8s_submit.settled(spec) if on == "k8s" else spec


def show(stage: str, cfg: RunConfig, run: RunFolder, on: str, *, chain: bool) -> str:
    """The text that ``submit`` would send to the scheduler. Changes nothing."""
    stages, table = lineage.waiting(cfg, run) if chain else [stage], used_by(cfg)
    if on == "k8s":
        return "\n---\n".join(k8s_submit.shown(job_spec(name, cfg, run)) for name in stages)
    return "\n".join(
        slurm_submit.shown(job_spec(name, cfg, run), [f"JOB_{need}" for need in table[name].needs if chain and need in stages]) for name in stages
    )


def check(stage: str, cfg: RunConfig, run: RunFolder, *, chain: bool) -> None:
    """Refuse at the submission what the job would be refused for at its start, after a wait in the queue. Changes nothing.

    Raises:
        ConfigError: a batch, or the rank of compression, does not divide over the processes.
    """
    # A launcher on a node without GPUs starts two ranks, or one on a single core: launch.default_nproc.
    ranks = cfg.cluster.gpus or min(2, cfg.cluster.cpus)
    for name in lineage.waiting(cfg, run) if chain else [stage]:
        if name not in TRAINED:
            continue
        try:
            if name in ("dalle", "align"):  # those of ZeRO's engine
                check_rank(cfg.compression, cfg.cluster.nodes, ranks)
            elastic.check(cfg, run, name, cfg.cluster.nodes * ranks)
        except ConfigError:
            if not places.finished(cfg, run, name):  # asked last, because a dry run may not be able to read the run's storage
                raise


def submit(stage: str, cfg: RunConfig, run: RunFolder, on: str, *, chain: bool, command: str, going_on: str = "") -> None:
    """Claim the run folder and submit a stage, or with ``chain`` all that are not finished. Twice does no harm: what is queued stays alone. A refusal leaves no run.

    Raises:
        ConfigError: the scheduler refuses; a job of the stage is there while the run is to go on with other values; or ``chain`` on Kubernetes, which has no dependencies between jobs.
        DataError: an input is not there, and nothing makes it.
    """
    if chain and on == "k8s":
        raise ConfigError("--chain --on k8s: Kubernetes starts jobs at once; apply one stage after the other, or use --on slurm.")
    if on == "k8s":
        k8s_submit.overlay(job_spec(stage, cfg, run))  # raises if it cannot be submitted, before anything is written
    if going_on:
        _refuse_beside_another(stage, _settled(job_spec(stage, cfg, run), on), on)
    prepares = (chain or stage == "prepare") and not places.finished(cfg, run, "prepare")
    for line in submitted_inputs.check(cfg, on, prepares=prepares):
        print(f"{stage}: {line}")
    fresh = run.stored() is None
    cfg = places.claim(cfg, run, command, going_on)
    try:
        _submit_claimed(stage, cfg, run, on, chain=chain)
    except ReportedError:
        if fresh:  # the next try may have other values
            run.withdraw()
        raise


def _submit_claimed(stage: str, cfg: RunConfig, run: RunFolder, on: str, *, chain: bool) -> None:
    if not chain and places.finished(cfg, run, stage) and not STAGES[stage].repeats and not lineage.out_of_date(cfg, run, stage):
        print(f"{stage}: finished already ({run.at(stage, 'done.json')})")
        return
    if on == "k8s":
        submitted_inputs.require(stage, cfg, run)
    table = used_by(cfg)
    ids = _queued_inputs(stage, cfg, run) if on == "slurm" and not chain else {}
    for name in lineage.waiting(cfg, run) if chain else [stage]:
        spec, record = _settled(job_spec(name, cfg, run), on), run.at("jobs", f"{name}.json")
        if on == "k8s":
            print(k8s_submit.submit(spec), end="")
            facts = {"kind": k8s_standing.kind(spec), "namespace": spec.cluster.namespace, "shares": spec.count if spec.shape == "array" else 1}
            storage.write_json(record, {"scheduler": "k8s", "job": spec.name, "submitted": time.time()} | facts)
            continue
        ids[name], state = slurm_submit.submit(spec, record, [ids[need] for need in table[name].needs if need in ids])
        print(f"{name}: job {ids[name]}{f' is in the queue already ({state})' if state else ''}", flush=True)
    if on == "slurm":
        print(f"squeue --me; output in {slurm_submit.logs(spec)}; progress: python launcher.py status {shlex.quote(run.url)}")


def _queued_inputs(stage: str, cfg: RunConfig, run: RunFolder) -> dict[str, str]:
    """Jobs in SLURM's queue that make those inputs of a stage that do not exist yet.

    Raises:
        DataError: an input is missing, and no queued job makes it.
    """
    found = {}
    for need in used_by(cfg)[stage].needs:
        if places.finished(cfg, run, need):
            continue
        there = slurm_submit.queued(job_spec(need, cfg, run))
        if there is None:
            raise DataError(
                f"{stage} needs what '{need}' makes, which has not finished and is in no queue: run '{launcher(need, run.url)} --on slurm' first "
                "(a new run: with its preset and values in place of the folder); --chain submits what is missing too."
            )
        found[need] = there.job
    return found


def _refuse_beside_another(stage: str, spec: JobSpec, on: str) -> None:
    """Refuse to change values while a job of the stage exists: it would take them over only at its next restart, at a checkpoint that nobody chose."""
    if on == "slurm" and (there := slurm_submit.queued(spec)) is not None:
        raise ConfigError(
            f"--go-on: job {there.job} of '{stage}' is in the queue with other values; let it end, or scancel {there.job}, and go on from its checkpoint."
        )
    if on == "k8s" and (standing := k8s_standing.find(spec)) is not None and standing.state == "live":
        raise ConfigError(
            f"--go-on: the job {spec.name} is in the cluster with other values; let it end, or delete it (kubectl delete, which lets it save), and go on "
            "from its checkpoint."
        )


@dataclass(frozen=True)
class Start:
    """One start of a SLURM job, with what its batch script knows of it."""

    job: str
    restart: int
    code: int
    """srun's exit code."""


def verdict(label: str, run: RunFolder, start: Start, retries: int) -> ledger.Verdict:
    """What the scheduler should do now that all launchers of a start have ended; the attempt's end is written down.

    Where the ledger has no attempt of this start (a wrong configuration, a node that fails its checks), srun's code decides. Where srun has ended and a launcher
    has not (SLURM gave the node up), its ranks are not judged: the start that follows asks it to save and end.
    """
    if start.job and lease.lives(run.url, label, start.job, start.restart):
        return ledger.Verdict(
            ExitCode.REQUEUE, "srun has ended, and the launcher that it started lives on: SLURM has lost this node; nothing is judged"
        )
    mine, trains = f"{start.job}.{start.restart}", label in TRAINED
    saved = ledger.newest_checkpoint(run, label)
    attempts = ledger.decisive(run, label, saved) if next((each.run_id for each in ledger.newest_first(run, label)), "") == mine else []
    if attempts:
        return ledger.judge(attempts, saved, retries, ledger.STOPS if trains else None)
    newer = _begun_since(label, run, start)
    if newer is not None:
        return ledger.Verdict(ExitCode.REQUEUE, f"attempt {newer.number}, by job {newer.run_id}, has begun since: this one has lost the work")
    if start.code == ExitCode.REQUEUE and trains and (idle := _starts_without_attempt(label, run, start)) > ledger.STOPS:
        return ledger.Verdict(
            ExitCode.DIVERGED,
            f"stopped {idle} times in a row before an attempt was begun: the time limit is not longer than the signal before it, or the machine is taken away",
        )
    if start.code in set(ExitCode) - {ExitCode.CRASH}:
        return ledger.Verdict(start.code, "ended before an attempt was begun: see the log")
    if start.restart < retries:
        return ledger.Verdict(ExitCode.REQUEUE, f"crashed before an attempt was begun (restart {start.restart}; {retries} are made)")
    return ledger.Verdict(ExitCode.DIVERGED, f"crashed before an attempt was begun, {start.restart} restarts in a row")


def _starts_without_attempt(label: str, run: RunFolder, start: Start) -> int:
    """How many starts of a job in a row, this one included, have begun no attempt."""
    newest = next((each for each in ledger.newest_first(run, label) if each.run_id.startswith(f"{start.job}.")), None)
    return start.restart - (newest.restart if newest is not None else -1)


def _begun_since(label: str, run: RunFolder, start: Start) -> ledger.Attempt | None:
    """The newest attempt, if this start had begun an older one. The search ends at an attempt of an earlier start of the same job, because starts of a job do
    not overlap."""
    newest = None
    for attempt in ledger.newest_first(run, label):
        if attempt.run_id == f"{start.job}.{start.restart}":
            return newest
        if attempt.run_id.startswith(f"{start.job}.") and attempt.restart < start.restart:
            return None
        newest = newest or attempt
    return None


class Judged(ReportedError):
    """Ends the process with the exit code that the verdict on a stage's attempt names."""

    def __init__(self, stage: str, found: ledger.Verdict) -> None:
        super().__init__(f"{stage}: {found.reason}")
        self.exit_code = ExitCode(found.code)
