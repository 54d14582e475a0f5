"""A stop signal where a process has nothing to lose, and what others make of it. A few seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infra import logs, lost_peer, node_checks, signals
from infra.errors import ExitCode, StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train import attempt as attempt_module
from train.config import load_run
from train.run.stage_table import STAGES, Stage


def test_a_stop_ends_what_has_nothing_to_lose_at_once_and_sets_a_flag_where_work_is_under_way() -> None:
    stop = StopFlag()
    stop.handle(signal.SIGTERM, None)
    assert stop and stop.received == signal.SIGTERM
    with pytest.raises(StopRequested, match="stopped by SIGTERM during the evaluation; nothing was lost"):
        stop.phase("the evaluation")
    stop.handle(signal.SIGUSR2, None)  # once: what cleans up is not struck again
    stop = StopFlag()
    stop.phase("the restoring of a checkpoint")
    with pytest.raises(StopRequested, match="stopped by SIGUSR2 during the restoring of a checkpoint") as caught:
        stop.handle(signal.SIGUSR2, None)
    assert caught.value.at_once and caught.value.exit_code == ExitCode.REQUEUE and 0 <= stop.latency_s() < 60
    assert stop.struck == "the restoring of a checkpoint"
    stop = StopFlag()
    stop.phase("the start")
    stop.orderly("an update")
    stop.doing("a save")
    stop.handle(signal.SIGUSR2, None)
    stop.doing("an update")
    stop.handle(signal.SIGTERM, None)
    assert stop.received == signal.SIGTERM and stop.struck == "a save", "the first signal counts"


_SWALLOWS = """
import sys, time
sys.path.insert(0, {root!r})
from infra import signals
from infra.errors import StopRequested
stop, swallowed = signals.install(), 0
def optional():  # as libraries try what may be absent
    global swallowed
    try:
        print("up", flush=True)
        time.sleep(20)
    except Exception:
        swallowed += 1
try:
    stop.phase("the imports", insisting={insisting})
    optional()
    time.sleep(1.5)
    stop.orderly("the work")
    print("went on", flush=True)
except StopRequested as error:
    stop.orderly("the end of the process")
    time.sleep(1.2)  # what cleans up is struck no more
    print(swallowed, error)
"""


@pytest.mark.parametrize("insisting", [True, False])
def test_a_stop_that_a_library_swallows_is_raised_again_where_nothing_is_cleaned_up(insisting: bool) -> None:
    words = _SWALLOWS.format(root=str(ROOT), insisting=insisting)
    process = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.terminate()
    said = process.communicate(timeout=PATIENCE_S)[0]
    assert said == ("1 stopped by SIGTERM during the imports; nothing was lost.\n" if insisting else "went on\n"), said


def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[StopFlag], None], world: World, stop: StopFlag) -> tuple[int, str]:
    """How a rank ends whose stage does this."""

    class Made(Stage):
        def function(self) -> Callable[..., None]:  # type: ignore[override]
            return lambda cfg, run, world, stop: work(stop)

    monkeypatch.setitem(STAGES, "dvae", Made("", "", "", trains=True))
    run = RunFolder(str(tmp_path))
    attempt = run.begin_attempt("dvae", size=world.size)
    code = attempt_module.guarded("dvae", load_run("tiny", []), run, world, stop, attempt)
    record = [each for each in run.records("dvae", attempt) if each["rank"] == world.rank][-1]
    assert record["code"] == code
    return code, str(record["reason"])


def test_a_rank_that_is_stopped_in_a_phase_ends_with_75_and_says_in_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stop = signals.install()

    def work(stop: StopFlag) -> None:
        stop.phase("the restoring of a checkpoint")
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")

    caplog.set_level(logging.INFO)
    found = ended(tmp_path, monkeypatch, work, World.single(), stop)
    assert found == (75, "stopped by SIGTERM during the restoring of a checkpoint; nothing was lost.")
    assert "dvae: ended 0.0 s after SIGTERM, which came during the restoring of a checkpoint" in caplog.text


def test_an_import_that_makes_another_error_of_a_stop_is_stopped_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = signals.install()

    def work(stop: StopFlag) -> None:
        stop.phase("the imports", insisting=True)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StopRequested as error:
            raise ImportError("numpy was only half imported") from error

    code, reason = ended(tmp_path, monkeypatch, work, World.single(), stop)
    assert code == 75 and "stopped by a signal, which ended the imports in ImportError: numpy was only half imported; nothing was lost" in reason

    def breaks(stop: StopFlag) -> None:
        stop.phase("the imports", insisting=True)
        raise ImportError("no such library")

    assert ended(tmp_path, monkeypatch, breaks, World.single(), StopFlag())[0] == 1


def test_weights_whose_loading_makes_another_error_of_a_stop_are_left_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gathers whatever is raised as it copies a parameter, and raises an error of its own: encode, told to stop as it opened its weights, had crashed."""
    import torch

    class Struck(torch.nn.Module):
        def _load_from_state_dict(self, *given: Any) -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            except Exception as error:  # as torch's own does for each parameter
                given[-1].append(str(error))

    def work(stop: StopFlag) -> None:
        stop.phase("the start")
        Struck().load_state_dict({})

    code, reason = ended(tmp_path, monkeypatch, work, World.single(), signals.install())
    assert code == 75 and "stopped by a signal, which ended the start in RuntimeError: Error(s) in loading state_dict" in reason

    def swallowed(stop: StopFlag) -> None:
        stop.phase("the start")
        with contextlib.suppress(StopRequested):
            os.kill(os.getpid(), signal.SIGTERM)
        stop.orderly("an update")
        raise RuntimeError("a bug of the update")

    assert ended(tmp_path, monkeypatch, swallowed, World.single(), signals.install())[0] == 1, "the stop has nothing to do with it"


@pytest.mark.parametrize(("stopped", "peers", "expected"), [(True, None, 75), (False, 75, 75), (False, None, 1), (False, 65, 1)])
def test_who_loses_a_peer_that_was_stopped_has_not_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool, peers: int | None, expected: int
) -> None:
    """Its own signal comes a moment later, or only one node is told to go."""
    monkeypatch.setattr(attempt_module, "why_peer_ended", partial(lost_peer.why_peer_ended, wait_s=0.1))
    stop = StopFlag()

    def work(stop: StopFlag) -> None:
        stop.phase("the start")
        if stopped:
            stop.received = signal.SIGTERM
        if peers is not None:
            RunFolder(str(tmp_path)).record_exit("dvae", 0, 1, peers, "said why", alone=True)
        raise RuntimeError("Connection closed by peer [127.0.0.1]:1")

    code, reason = ended(tmp_path, monkeypatch, work, World(0, 2, 0, 2), stop)
    assert code == expected, reason
    words = {
        (True, None): "as the ranks that it waited for",
        (False, 75): "ended after a stop of rank 1: said why",
        (False, 65): "ended after rank 1: said why",
    }
    assert words.get((stopped, peers), "another rank is gone (RuntimeError: Connection closed by peer") in reason


_DEAF = """
import os, sys, threading
sys.path.insert(0, {root!r})
from datetime import timedelta
from infra import signals
stop = signals.install()
def end(reason):
    print(reason, flush=True)
    os._exit(75)
from torch.distributed import TCPStore
with stop.watched(end, 0.2):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    {phase}
    threading.Timer(0.5, lambda: print("up", flush=True)).start()  # once the main thread is in there
    store.wait(["what a rank that has ended would have said"], timedelta(seconds=4))
"""


@pytest.mark.parametrize("idle", [True, False])
def test_a_rank_that_waits_in_a_library_for_one_that_was_stopped_is_ended_if_it_has_nothing_to_lose(idle: bool) -> None:
    words = _DEAF.format(root=str(ROOT), phase='stop.phase("the start")' if idle else 'stop.orderly("a save")')
    process = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    process.terminate()
    output = process.communicate(timeout=PATIENCE_S)[0]
    if idle:
        assert (process.returncode, output) == (75, "stopped by SIGTERM during the start; nothing was lost.\n")
    else:
        assert (process.returncode, output) == (1, ""), "work under way is not left; the store's own time-out came"


def test_the_phases_of_the_main_rank_are_shown_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from infra import logs, signals; logs.show(); stop = signals.StopFlag(); "
        "stop.phase('the start'); stop.orderly('an update'); stop.doing('an update'); stop.doing('a save')"
    )
    for given, rank, shown in (("1", "0", "begins: the start\nbegins: an update\nbegins: a save\n"), ("", "0", ""), ("1", "3", "")):
        env = os.environ | {"LAUNCHER_DEBUG": given, "RANK": rank}
        done = subprocess.run([sys.executable, "-c", words, "--worker"], env=env, capture_output=True, text=True, check=True)
        assert done.stderr == shown


def test_a_stop_does_not_wait_until_python_has_taken_everything_apart() -> None:
    words = f"""
import atexit, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from infra import output
class Model:
    def __del__(self):
        print("taken apart", flush=True)
model = Model()
threading.Thread(target=time.sleep, args=(30,)).start()
atexit.register(print, "released")
print("said last", end="")
output.leave(75)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "said lastreleased\n", "") and time.monotonic() - began < 20


def test_lines_of_a_job_have_their_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("infra", logging.WARNING, "", 0, "a line", None, None)
    record.created = 1_790_000_000.0
    for name in ("LAUNCHER_JOB", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert logs._Lines().format(record) == "a line"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert logs._Lines().format(record) == "2026-09-21T14:13:20Z a line"


@pytest.mark.parametrize(
    ("saves", "found"),
    [({}, "30 s"), ({"dvae": 20.0}, "30 s"), ({"dvae": 2.0, "dalle": 41.0}, "WARNING: 30 s, and the last save of 'dalle' took 41 s")],
)
def test_the_doctor_warns_where_killwait_is_shorter_than_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saves: dict[str, float], found: str
) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'KillOnBadExit = 0'\necho 'KillWait                = 30 sec'\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (said,) = node_checks.kill_wait(saves)
    assert said.ok and said.found.startswith(found) and ("scancel --signal=USR2" in said.found) == found.startswith("WARNING")
    monkeypatch.setenv("PATH", "/nowhere")
    assert node_checks.kill_wait(saves) == []


def test_the_doctor_says_where_a_hosts_name_leads_to_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # empty is unset, and this is undone whatever the code puts there
    monkeypatch.setattr(node_checks.interfaces, "is_loopback", lambda name: True)
    (said,) = node_checks.host_name()
    assert said.ok and "leads to the loopback or nowhere: a job takes the interface by which node 0 is reached" in said.found
    monkeypatch.setattr(node_checks.interfaces, "is_loopback", lambda name: False)
    assert node_checks.host_name() == []
