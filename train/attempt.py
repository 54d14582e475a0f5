"""One attempt at a stage: its ranks, how each of them ends, and what is recorded of it. No torch here."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import traceback
from dataclasses import replace

from infra import announce, deferred_writes, environment, evidence, exit_records, ledger, listening, live, output
from infra.agent import Placement, begin, run_ranks
from infra.errors import ConfigError, ExitCode, ReportedError, StopRequested
from infra.lost_peer import AFTER, NOBODY_KNOWS, STOPPED, is_lost_peer, why_peer_ended
from infra.repository import LAUNCHER
from infra.run_folder import RunFolder, commit
from infra.signals import StopFlag
from infra.world import Share, World
from train.config import RunConfig
from train.planning.out_of_memory import advice, is_out_of_memory
from train.ranks import watchdog
from train.run import elastic
from train.run.stage_table import STAGES

log = logging.getLogger(__name__)

_EXIT_GRACE_S = 20  # a failed rank's libraries may hang in their own shutdown


def execute(name: str, cfg: RunConfig, run: RunFolder, placement: Placement, stop: StopFlag, restarts: int = 0) -> tuple[int, str]:
    label = labelled(name)
    if placement.size == 1 and not restarts:
        code, reason = _alone(name, cfg, run, placement, stop, label)
        _say_why(run, label, code, placement)
        return code, reason
    placement = replace(placement, retries=restarts or None)
    while True:
        code, reason = run_ranks([str(LAUNCHER), name, run.config_url, "--worker"], placement, run, label, stop)
        _say_why(run, label, code, placement)
        if code != ExitCode.CRASH or not restarts or stop:
            return code, reason
        found = ledger.judge(ledger.decisive(run, label, saved := ledger.newest_checkpoint(run, label)), saved, restarts)
        if found.code != ExitCode.REQUEUE:
            return found.code, found.reason
        print(f"{name}: {found.reason}; starting the ranks again", flush=True)
        placement = replace(placement, job=replace(placement.job, restart=placement.job.restart + 1))


def _say_why(run: RunFolder, label: str, code: int, placement: Placement) -> None:
    """After an attempt that failed: what is known of it, and whether to start it again. Of what a person got wrong the last line says enough: there the
    verdict alone."""
    if code in (ExitCode.DONE, ExitCode.REQUEUE) or placement.job.node:
        return
    from train.advice import facts, words

    with contextlib.suppress(ReportedError, OSError):  # where the storage is away, it cannot be read; the reason stands in the last line
        found = facts.gather(run, label)
        if found is not None:
            whole = code in (ExitCode.CRASH, ExitCode.DIVERGED)
            print(words.of(found, said=False) if whole else words.verdict(found), file=sys.stderr, flush=True)


def _alone(name: str, cfg: RunConfig, run: RunFolder, placement: Placement, stop: StopFlag, label: str) -> tuple[int, str]:
    """Run a stage in this process, which is launcher and rank in one."""
    attempt, killed = begin(placement, run, label), evidence.memory_kills()
    with listening.listening(run.url, label, attempt, placement.job, announce.announcer(placement.job)) as words, deferred_writes.taking_notes():
        ended = guarded(name, cfg, run, World.single(), stop, attempt)
        evidence.write(run, label, attempt, 0, {0: ended}, killed, words)
    records = run.records(label, attempt)
    code, reason = exit_records.root_cause(records, 1)
    ledger.write_end(run, label, attempt, ledger.ending(code, reason, records))
    return code, reason if code else ""


def guarded(name: str, cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag, attempt: int) -> int:
    """Run a stage's function as one rank, and record how it ended."""
    faulthandler.enable()
    if world.is_main:
        commit()  # asked now and kept: outputs name what runs, not what is checked out when they are written
    code, reason = ExitCode.DONE, "finished"
    label = labelled(name)
    live.begin(world.rank)
    listening.copy_output(run.url, label, attempt, world.rank)
    watchdog.start(lambda code, reason: run.record_exit(label, attempt, world.rank, code, reason))
    alone = False

    def end(reason: str) -> None:
        run.record_exit(label, attempt, world.rank, ExitCode.REQUEUE, reason, alone=world.size > 1)
        os._exit(ExitCode.REQUEUE)

    try:
        with stop.watched(end) if world.size > 1 else contextlib.nullcontext():
            stop.phase("the imports", insisting=True)
            function = STAGES[name].function()
            stop.phase("the start")
            function(elastic.adapted(cfg, run, name, world), run, world, stop)
            stop.orderly("the end of the process")
    except ReportedError as error:
        alone = isinstance(error, StopRequested) and error.at_once
        stop.orderly("the end of the process")
        code, reason = error.exit_code, str(error)
    except Exception as error:
        idle = stop.name or stop.ended
        stop.orderly("the end of the process")
        code, reason, alone = *_explained(name, cfg, run, world, attempt, error, stopped=idle if stop else ""), bool(stop)
    if code == ExitCode.REQUEUE and stop.received and world.is_main:
        log.info("%s: ended %.1f s after %s, which came during %s", name, stop.latency_s(), stop.received.name, stop.struck)
    run.record_exit(label, attempt, world.rank, code, reason, alone=alone and world.size > 1)
    live.say(now=True, phase="")
    live.end()
    output.copy_no_more()
    return code


def _explained(name: str, cfg: RunConfig, run: RunFolder, world: World, attempt: int, error: Exception, *, stopped: str) -> tuple[ExitCode, str]:
    """Code and reason of a rank whose stage ended with an error that has none.

    Args:
        stopped: the phase in which this rank was asked to stop, with nothing to lose; its peers were as well, and may have gone first. '' where it was not.
    """
    reason = f"{type(error).__name__}: {error}"
    if is_out_of_memory(error):
        return ExitCode.CRASH, advice(name, cfg, world.size, error)
    if stopped and not is_lost_peer(error):  # a library has made it of the stop
        return ExitCode.REQUEUE, f"stopped by a signal, which ended {stopped} in {reason.splitlines()[0]}; nothing was lost."
    if not is_lost_peer(error):
        traceback.print_exc()
        return ExitCode.CRASH, reason
    if stopped:
        return ExitCode.REQUEUE, "stopped by a signal, as the ranks that it waited for; nothing was lost."
    said = why_peer_ended(run, labelled(name), attempt, world.rank)
    if said.startswith(STOPPED):
        return ExitCode.REQUEUE, f"ended after {said}"
    return ExitCode.CRASH, f"{AFTER}{said}" if said else f"{NOBODY_KNOWS} ({reason.splitlines()[0]})"


def exit_soon(code: int) -> None:
    """End this rank with ``code``, even if a library's own shutdown hangs after a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == ExitCode.DONE:
        from train.ranks.device import leave_group  # torch, which every rank has by now

        leave_group()
    else:
        timer = threading.Timer(_EXIT_GRACE_S, os._exit, args=(code,))
        timer.daemon = True
        timer.start()
    if code == ExitCode.REQUEUE:
        output.leave(code)
    sys.exit(code)


def labelled(name: str) -> str:
    """The stage, or the share of it that this launcher does: the name of its lock and of its exit records.

    Raises:
        ConfigError: the work of this stage cannot be shared, or the share is no share.
    """
    entry = STAGES[name]
    share = Share.from_env() if entry.shared or environment.text("LAUNCHER_SHARE") else Share()
    if share.count > 1 and not entry.shared:
        shared = ", ".join(stage for stage, other in STAGES.items() if other.shared)
        raise ConfigError(f"--share {share.index}/{share.count}: '{name}' is not divided among launchers; {shared} are.")
    return share.label(name)
