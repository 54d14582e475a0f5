"""One writer for each stage: leases on local folders and on a real S3, holders that are killed, paused or slow, and clocks that differ. About 25 s."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from infra import files, lease, storage
from infra.errors import ConfigError, StopRequested, SupersededError
from infra.job import Job
from infra.lease import Holder, hold
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.run.cluster import Start, verdict
from train.weights import checkpoint
from train.weights.checkpoint_storage import Writer
from train.weights.fragments import Fragment, even_slice

SHORT_S = 1.0
"""A lease that a test waits for; only of holders that show no sign anyway."""
HOLDER = """
import os, sys, time
import infra.lease as lease
from infra import signals
from infra.errors import ReportedError
from infra.job import Job
from infra.run_folder import RunFolder
stop, run, (job, restart, skew) = signals.install(), RunFolder(sys.argv[1]), sys.argv[2:5]
real = time.time
time.time = lambda: real() + float(skew)
try:
    with run.lock("dvae", Job(job, int(restart)), stop) as held:
        print("holds", flush=True)
        while not stop:
            time.sleep(0.02)
        run.finish("dvae")
except ReportedError as error:
    print(f"ended: {error}", flush=True)
    sys.exit(error.exit_code)
"""


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else str(request.getfixturevalue("s3"))


@pytest.fixture
def holder() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that holds the lease of dvae until it is stopped, and then marks the stage finished."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, job: str = "", restart: int = 0, skew: float = 0.0, **variables: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLDER, url, job, str(restart), str(skew)]
        process = subprocess.Popen(words, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "holds\n", process.communicate()[0]
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def tree(url: str) -> dict[str, str]:
    return {name: hashlib.sha256(storage.read_bytes(storage.join(url, name))).hexdigest() for name in storage.list_files(url)}


def somebody(**facts: object) -> Holder:
    """A launcher of another machine."""
    return replace(Holder("t", "gpu07", 4711, "boot pid:[1] 4711 5", "", 0, time.time() - 7200, lease.LEASE_S), **facts)  # type: ignore[arg-type]


def place(url: str, holder: Holder, number: int = 3) -> str:
    file = storage.join(url, "locks", "dvae", f"{number:08d}.json")
    storage.write_json(file, asdict(holder))
    return file


def test_a_second_launcher_ends_at_once_and_names_holder_host_and_age(url: str) -> None:
    place(url, somebody(job="77", restart=2))
    began = time.monotonic()
    message = r"another launcher runs 'dvae' in this folder: process 4711 on gpu07 \(job 77, restart 2\), for 2 h 0 min, its last sign \d+ s ago; wait for it, or"
    for job in (Job(), Job("78")):  # a person's launcher, and a person's job
        with pytest.raises(ConfigError, match=message), hold(url, "dvae", job):
            pass
    assert time.monotonic() - began < lease.LEASE_S / 2
    with hold(url, "encode.0-of-2", Job()), hold(url, "encode.1-of-2", Job()):
        pass  # other stages, and shares of one, do not meet


def test_a_lease_that_is_released_goes_to_the_next_and_numbers_are_never_used_again(url: str) -> None:
    for number in range(3):
        with hold(url, "dvae", Job()) as held:
            assert (held.number, storage.list_files(storage.join(url, "locks", "dvae"))) == (number, [f"{number:08d}.json"])
            lease.check()  # as ranks do
            assert os.environ["LAUNCHER_LEASE"].endswith(f"locks/dvae#{number}")
    assert "LAUNCHER_LEASE" not in os.environ


def test_of_racing_launchers_one_wins(url: str) -> None:
    won, lost, over = [], [], threading.Event()
    ready = threading.Barrier(4)

    def race(number: int) -> None:
        ready.wait()
        try:
            held = lease._take(storage.join(url, "locks", "dvae"), "busy", Job(), None)
            won.append(held)
            over.wait(PATIENCE_S)
        except ConfigError as error:
            lost.append(str(error))
        if len(lost) == 3:
            over.set()

    racers = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert (len(won), len(lost)) == (1, 3)


def test_a_killed_launcher_of_this_machine_keeps_nobody_waiting(url: str, holder: Callable[..., subprocess.Popen[str]]) -> None:
    process = holder(url)
    with pytest.raises(ConfigError, match=f"process {process.pid} on "), hold(url, "dvae", Job()):
        pass
    process.kill()
    process.wait()
    with hold(url, "dvae", Job()) as held:
        assert held.number == 1


def test_a_silent_launcher_of_another_machine_is_replaced_after_its_own_lease_and_a_living_one_is_not(url: str) -> None:
    file = place(url, somebody(lease_s=SHORT_S))
    began = time.monotonic()
    with hold(url, "dvae", Job("77", restart=1)) as held:  # whatever the clocks say, it was watched for that long
        assert held.number == 4 and time.monotonic() - began > SHORT_S and not storage.exists(file)
    living = somebody(job="77", lease_s=3 * SHORT_S)
    place(url, living, 9)
    ended = threading.Event()

    def live() -> None:
        beat = 0
        while not ended.wait(SHORT_S / 4):
            beat += 1
            place(url, replace(living, beat=beat), 9)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease, "PATIENCE_S", 4 * SHORT_S)
            with (
                pytest.raises(SupersededError, match=r"process 4711 on gpu07 .* did not end within 4 s. Nothing was begun."),
                hold(url, "dvae", Job("77", 1)),
            ):
                pass
    finally:
        ended.set()
        thread.join()
    assert not [name for name in storage.list_files(storage.join(url, "locks", "dvae")) if name.startswith("request")]
    assert SupersededError.exit_code == 75


def test_a_lease_without_content_is_given_up_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a launcher dies while it makes one, without hard links."""
    monkeypatch.setenv("LAUNCHER_LEASE_S", str(SHORT_S))
    (tmp_path / "locks" / "dvae").mkdir(parents=True)
    (tmp_path / "locks" / "dvae" / "00000000.json").touch()
    with pytest.raises(ConfigError, match="on a node that has not said more, since a time that it has not said"), hold(str(tmp_path), "dvae", Job()):
        pass
    with hold(str(tmp_path), "dvae", Job("77", 1)) as held:
        assert held.number == 1


def test_a_stop_signal_ends_the_wait(tmp_path: Path) -> None:
    place(str(tmp_path), somebody())
    stop = StopFlag()
    stop.received = signal.SIGTERM
    with pytest.raises(StopRequested, match="nothing was begun"), hold(str(tmp_path), "dvae", Job("77", 1), stop):
        pass


def test_the_later_start_of_a_job_lets_the_earlier_one_save_and_end(url: str, holder: Callable[..., subprocess.Popen[str]]) -> None:
    """As where a scheduler has lost a node whose processes live on, and starts the job elsewhere."""
    orphan = holder(url, "77", 0, LAUNCHER_LEASE_S="6")
    with hold(url, "dvae", Job("77", 1)) as held:
        assert held.number == 1 and orphan.wait(timeout=PATIENCE_S) == 0, orphan.communicate()[0]  # it held the lease to its end, and so could save
        assert storage.exists(storage.join(url, "dvae", "done.json"))
        with pytest.raises(SupersededError), pytest.MonkeyPatch.context() as patch:  # an earlier start that comes late moves nobody
            patch.setattr(lease, "PATIENCE_S", 0.5)
            patch.setattr(os, "kill", lambda *words: pytest.fail("the later start must go on"))
            held.holder = replace(held.holder, restart=5)
            held.beat()
            with hold(url, "dvae", Job("77", 2)):
                pass


@pytest.mark.parametrize("seen", [True, False], ids=["its process can be looked for", "it runs in a space of its own"])
def test_a_living_launcher_is_not_judged_killed_where_srun_has_ended(
    url: str, holder: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    """The job script of a node that SLURM has lost, with its srun: the ranks live on, and save."""
    run = RunFolder(url)
    number = run.begin_attempt("dvae", size=1, job="77", restart=0, run_id="77.0", saved=-1)
    living = holder(url, "77", 0, LAUNCHER_LEASE_S="6")
    if not seen:
        monkeypatch.setattr(lease, "_is_here", lambda holder: False)
    found = verdict("dvae", run, Start("77", 0, 137), 3)
    assert found.code == 75 and "the launcher that it started lives on" in found.reason
    assert not storage.exists(run.attempt_url("dvae", number, "end.json"))
    assert verdict("dvae", run, Start("77", 1, 137), 3).reason != found.reason, "another start's launcher is not this one's"
    living.kill()
    living.wait()
    began = time.monotonic()
    assert "rank 0 ended without a record: it was killed" in verdict("dvae", run, Start("77", 0, 137), 3).reason
    assert storage.exists(run.attempt_url("dvae", number, "end.json")) and time.monotonic() - began < 30


def test_a_holder_that_was_paused_past_its_lease_writes_nothing_when_it_wakes(url: str, holder: Callable[..., subprocess.Popen[str]]) -> None:
    paused = holder(url, "77", 0, LAUNCHER_LEASE_S="3")
    paused.send_signal(signal.SIGSTOP)
    with hold(url, "dvae", Job("77", 1)) as held:
        assert held.number == 1
        before = {name: digest for name, digest in tree(url).items() if "/locks/" not in f"/{name}"}
        paused.send_signal(signal.SIGCONT)  # its next beat finds out, and stops what it runs; the marker is refused
        assert paused.wait(timeout=PATIENCE_S) == 75
        said = paused.communicate()[0]
        assert f"the work was taken over by process {os.getpid()} on" in said and "ended: " in said, said
        assert {name: digest for name, digest in tree(url).items() if "/locks/" not in f"/{name}"} == before
        lease.check()  # the winner's own is untouched
        assert not held.lost


@pytest.mark.parametrize("skew", [-300.0, 300.0])
def test_clocks_five_minutes_apart_neither_end_a_living_launcher_nor_keep_a_dead_one(
    tmp_path: Path, holder: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    url = str(tmp_path)
    monkeypatch.setattr(storage, "modified", lambda file: Path(file).stat().st_mtime + (skew if file.endswith("00.json") else 0.0))
    living = holder(url, skew=skew, LAUNCHER_LEASE_S="6")
    with pytest.raises(ConfigError, match=f"process {living.pid} on "), hold(url, "dvae", Job()):
        pass  # where its files look old on a mount that keeps the writer's time, it is watched first
    living.send_signal(signal.SIGTERM)
    assert living.wait(timeout=PATIENCE_S) == 0
    monkeypatch.setattr(time, "time", lambda real=time.time: real() - skew)
    place(url, somebody(lease_s=SHORT_S))
    with hold(url, "dvae", Job("77", 1)) as held:
        assert held.number == 4


def test_what_has_lost_its_lease_refuses_markers_and_leaves_checkpoints_alone(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    tensor = torch.arange(6.0)
    fragments = {"model/w": even_slice(tensor, 0, 1)}
    meta = {"shapes": {"w": [6]}}
    with hold(run.url, "dvae", Job()) as held:
        checkpoint.save(run.at("dvae"), 5, fragments, meta, World.single(), keep=1)
        before = tree(run.at("dvae"))
        held._ended.set()  # asleep
        place(run.url, somebody(), held.number + 1)
        tensor += 1
        for step in (5, 10):  # the winner's own, and one that would push it out
            with pytest.raises(SupersededError, match="taken over by process 4711 on gpu07; nothing more is written here"):
                checkpoint.save(run.at("dvae"), step, fragments, meta, World.single(), keep=1)
        with pytest.raises(SupersededError, match="taken over"):
            run.finish("dvae")
        assert tree(run.at("dvae")) == before
    assert json.loads((tmp_path / "locks" / "dvae" / "00000001.json").read_text())["released"] is False, "the winner's lease is not given away"


def test_a_checkpoint_whose_writing_outlasts_the_lease_gets_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, fragments = RunFolder(str(tmp_path)), {"model/w": even_slice(torch.arange(6.0), 0, 1)}
    with hold(run.url, "dvae", Job()) as held:
        held._ended.set()
        write = Writer.write

        def slow(writer: Writer, own: Mapping[str, Fragment]) -> None:
            place(run.url, somebody(), held.number + 1)
            write(writer, own)

        monkeypatch.setattr(Writer, "write", slow)
        with pytest.raises(SupersededError):
            checkpoint.save(run.at("dvae"), 5, fragments, {"shapes": {"w": [6]}}, World.single(), keep=1)
    assert checkpoint.complete(run.at("dvae")) == []


def test_a_launcher_that_has_lost_and_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[object] = []
    kills: list[int] = []
    monkeypatch.setattr(lease, "GRACE_S", 0.1)
    monkeypatch.setattr(os, "kill", lambda pid, number: kills.append(number))
    monkeypatch.setenv("LAUNCHER_LEASE_S", "0.6")
    with hold(str(tmp_path), "dvae", Job()) as held:
        held.end = ends.append
        place(str(tmp_path), somebody(), 1)
        held._thread.join(PATIENCE_S)
    assert (kills, ends) == ([signal.SIGTERM], [75]) and "taken over by process 4711" in held.lost


def test_a_file_system_without_hard_links_is_worked_with_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*words: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    files.kind_of_mount.cache_clear()
    ready, won = threading.Barrier(8), []

    def race(number: int) -> None:
        ready.wait()
        if files.create_once(tmp_path / "x", f"{number}".encode() * 1000):
            won.append(number)
        assert len((tmp_path / "x").read_bytes()) == 1000, "whoever lost finds the winner's content"

    with ExitStack() as stack:
        for number in range(8):
            racer = threading.Thread(target=race, args=(number,))
            racer.start()
            stack.callback(racer.join)
    assert len(won) == 1 and (tmp_path / "x").read_bytes() == f"{won[0]}".encode() * 1000
    with hold(str(tmp_path), "dvae", Job()), pytest.raises(ConfigError), hold(str(tmp_path), "dvae", Job()):
        pass
    assert "knows no hard links" in caplog.text and files.kind_of_mount(str(tmp_path)) in caplog.text
