"""Worker processes: the batches of one process, errors that name what ended, and no process that outlives its parent."""

from __future__ import annotations

import gc
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from data_pipeline.loading import shard_cache, shared_memory
from data_pipeline.loading.loaders import ShardLoader
from data_pipeline.loading.workers import Workers
from data_pipeline.shards.shard_set import ShardSet
from infra.errors import ConfigError, DataError, ReportedError
from infra.world import World
from tests.support.code_sets import COUNT, code_set, draw, loader
from tests.support.patience import PATIENCE_S
from tests.support.processes import alive
from tests.support.ranks import ROOT

pytestmark = [pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"), pytest.mark.filterwarnings("ignore:This DataLoader will create")]


@pytest.fixture
def shard_set(tmp_path: Path) -> ShardSet:
    return code_set(str(tmp_path))


def test_batches_do_not_depend_on_workers_or_ranks(shard_set: ShardSet, as_rank: Any) -> None:
    wanted = draw(as_rank([shard_set], 1), 20)  # a prime number of records in uneven shards, three epochs and a bit
    for size, workers in ((1, 1), (1, 3), (3, 2)):
        ranks = as_rank([shard_set], size, workers=workers, block=9) if size == 1 else as_rank([shard_set], size, workers=workers)
        if size == 3:
            assert draw(ranks, 20) == wanted
        else:
            plain = as_rank([shard_set], 1, block=9)
            assert [ranks[0].next() for _ in range(20)] == [plain[0].next() for _ in range(20)]
        for rank in ranks:
            rank.close()


def test_a_loader_resumes_to_the_sample_on_other_numbers_of_ranks_and_workers(shard_set: ShardSet, as_rank: Any) -> None:
    wanted = draw(as_rank([shard_set], 1), 14)
    state, done = None, 0
    for size, workers, batches in ((3, 2, 5), (2, 0, 2), (1, 3, 4), (6, 1, 3)):
        ranks = as_rank([shard_set], size, workers=workers)
        for rank in ranks:
            if state is not None:
                rank.restore(state)
        assert draw(ranks, batches) == wanted[done : done + batches]
        done, state = done + batches, ranks[-1].state()
        for rank in ranks:
            rank.close()


def test_a_loader_with_workers_goes_back_to_a_state_it_has_passed(shard_set: ShardSet) -> None:
    one = loader([shard_set], World.single(), workers=2)
    one.next()
    state = one.state()
    following = [one.next() for _ in range(9)]
    one.restore(state)
    assert [one.next() for _ in range(9)] == following
    one.close()


def test_workers_leave_the_random_numbers_of_the_weights_alone(shard_set: ShardSet) -> None:
    before = torch.get_rng_state()
    one = loader([shard_set], World.single(), workers=2)
    one.next()
    one.close()
    assert torch.equal(torch.get_rng_state(), before)


def counting(worker: int, workers: int) -> Iterator[int]:
    yield from range(worker, 10**9, workers)


def test_a_killed_worker_is_an_error_that_names_it() -> None:
    made = Workers(counting, 2, 1)
    assert [made.next() for _ in range(5)] == [0, 1, 2, 3, 4]
    os.kill(made.pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(
        ReportedError, match=rf"^worker 1 of 2 \(pid {made.pids[1]}, killed by SIGKILL\) of the loader ended; if .* lower data.workers"
    ):
        while True:
            made.next()
    assert time.monotonic() - began < 30
    made.close()


@pytest.mark.timeout(300)
def test_a_worker_killed_while_it_asks_whether_to_end_is_an_error_too() -> None:
    def hold(worker: int, workers: int) -> Iterator[int]:
        yield 0
        frame: FrameType | None = sys._getframe()
        while frame is not None and "done_event" not in frame.f_locals:
            frame = frame.f_back
        assert frame is not None
        event = frame.f_locals["done_event"]  # of DataLoader
        if isinstance(event, multiprocessing.synchronize.Event):  # it would hang the parent
            event._cond.acquire()  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGKILL)

    made = Workers(hold, 2, 1)
    with pytest.raises(ReportedError, match="killed by SIGKILL"):
        for _ in range(4):
            made.next()
    made.close()


def test_a_killed_worker_disturbs_nothing_but_the_next_batch() -> None:
    made = Workers(counting, 1, 1)
    made.next()
    os.kill(made.pids[0], signal.SIGKILL)
    time.sleep(0.3)  # an update: SIGCHLD arrives here
    with pytest.raises(ReportedError, match="killed by SIGKILL"):
        for _ in range(9):
            made.next()
    made.close()


def test_a_worker_that_exits_is_an_error_that_names_it() -> None:
    def leave(worker: int, workers: int) -> Iterator[int]:
        yield 0
        os._exit(3)

    made = Workers(leave, 1, 1)
    with pytest.raises(ReportedError, match=r"^worker 0 of 1 \(pid \d+, exit code 3\) of the loader ended"):
        for _ in range(3):
            made.next()
    made.close()


def failing(error: Exception) -> Callable[[int, int], Iterator[int]]:
    def make(worker: int, workers: int) -> Iterator[int]:
        yield 0
        raise error

    return make


def test_errors_of_workers_arrive_as_they_are() -> None:
    for error in (DataError("s3://bucket/shard: damaged"), ConfigError("/dev/shm is small")):
        made = Workers(failing(error), 1, 1)
        assert made.next() == 0
        with pytest.raises(type(error)) as caught:
            made.next()
        assert type(caught.value) is type(error) and str(caught.value) == str(error)
        made.close()
    made = Workers(failing(KeyError("a bug")), 1, 1)
    made.next()
    with pytest.raises(KeyError, match="a bug"):
        made.next()
    made.close()


def test_a_loader_goes_on_after_an_error(shard_set: ShardSet) -> None:
    one = loader([shard_set], World.single(), workers=1)
    first = one.next()
    os.kill(one.worker_pids[0], signal.SIGKILL)
    with pytest.raises(ReportedError, match="killed by SIGKILL"):
        for _ in range(9):
            first = one.next()
    again = loader([shard_set], World.single())
    again.restore(one.state())
    assert one.next() == again.next() != first
    one.close()


@pytest.mark.timeout(300)
def test_a_shard_that_a_killed_worker_was_preparing_is_prepared_by_the_next(
    shard_set: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, marker, parent = shard_cache.check_local, tmp_path / "was-here", os.getpid()

    def killed(*given: Any) -> None:
        if os.getpid() != parent and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        plain(*given)

    monkeypatch.setattr(shard_cache, "check_local", killed)
    one, plainly = loader([shard_set], World.single(), workers=1), loader([shard_set], World.single())
    with pytest.raises(ReportedError, match="killed by SIGKILL"):
        one.next()
    assert [one.next() for _ in range(5)] == [plainly.next() for _ in range(5)]
    one.close()
    plainly.close()


@pytest.mark.timeout(300)
def test_workers_that_are_forgotten_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 60)  # what DataLoader waits for one that has not ended
    gc.collect()
    gc.freeze()  # to collect what other tests have left takes long
    try:
        made = Workers(counting, 2, 1)
        made.next()
        pids = made.pids
        made.itself = made  # type: ignore[attr-defined]  # a cycle, as the traceback of an error makes one
        began = time.monotonic()
        del made
        gc.collect()
        assert time.monotonic() - began < 50 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    finally:
        gc.unfreeze()


def test_workers_hear_no_stop_signal_and_end_with_the_loader() -> None:
    made = Workers(counting, 2, 1)
    assert [made.next(), made.next()] == [0, 1]  # both have started
    pids = made.pids
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        for pid in pids:
            os.kill(pid, number)
    assert [made.next() for _ in range(6)] == [2, 3, 4, 5, 6, 7]
    made.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_worker_that_is_busy_is_killed_when_the_loader_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)

    def busy(worker: int, workers: int) -> Iterator[int]:
        yield 0
        time.sleep(600)

    made = Workers(busy, 1, 1)
    made.next()
    (pid,) = made.pids
    began = time.monotonic()
    made.close()
    assert time.monotonic() - began < 10 and not Path(f"/proc/{pid}").exists()


PARENT = """
import sys, time
import torch.utils.data
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2
from data_pipeline.loading.workers import Workers
def make(worker, workers):
    yield worker
    time.sleep(600)
made = Workers(make, 2, 1)
made.next()
print(*made.pids, flush=True)
if sys.argv[1] == "wait":
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["wait", "leave"])
def test_workers_end_with_their_parent_however_it_ends(how: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    if how == "wait":
        process.kill()
    assert process.wait(timeout=PATIENCE_S) == (-signal.SIGKILL if how == "wait" else 0)
    process.stdout.close()
    deadline = time.monotonic() + PATIENCE_S
    while any(alive(int(pid)) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and not any(alive(int(pid)) for pid in pids)


def test_a_worker_makes_as_many_batches_ahead_as_it_is_told(tmp_path: Path) -> None:
    def make(worker: int, workers: int) -> Iterator[int]:
        for number in range(100):
            (tmp_path / f"{number:03}").touch()
            yield number

    made = Workers(make, 1, 5)
    made.next()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(tmp_path.iterdir())) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # for one too many to show
    assert len(list(tmp_path.iterdir())) == 6, "the one that was taken, and five ahead"
    made.close()


def test_batches_that_do_not_fit_shared_memory_are_refused_before_they_get_there(shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_free_bytes", lambda: 9 << 20)
    one = ShardLoader(
        [shard_set], "", World.single(), 4, 0, lambda record, epoch: 0, lambda samples: {"x": torch.zeros(1 << 18)}, workers=3, prefetch=4
    )
    with pytest.raises(
        ConfigError, match=r"/dev/shm has 9 MiB free, but the batches that 3 workers prepare ahead \(1048576 bytes each\) need 12 MiB"
    ):
        one.next()
    one.close()
    fitting = ShardLoader([shard_set], "", World.single(), 4, 0, lambda record, epoch: 0, lambda samples: {"x": torch.zeros(1 << 18)}, workers=2)
    assert fitting.next()["x"].shape == (1 << 18,)
    fitting.close()


def test_an_epoch_read_by_workers_is_whole(shard_set: ShardSet) -> None:
    one = loader([shard_set], World.single(), batch=1, workers=2)
    assert sorted(one.next()[0] for _ in range(COUNT)) == sorted(f"id-{number}@0" for number in range(COUNT))
    one.close()
