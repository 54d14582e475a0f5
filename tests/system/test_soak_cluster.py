"""A simulated day of a cluster (``make soak``): twenty random faults meet two launchers of two ranks each, on a real S3 server; nothing is lost by them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from infra import ledger, storage
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from tests.support import gang
from tests.support.checkpoint_hashes import hashes
from tests.support.fault_proxy import FaultProxy, Rule, fault_proxy
from tests.support.gang import Gang, send
from tests.support.s3_server import S3Server
from train.loop.metrics import read_metrics

STAGE = "dvae"
DAY = (
    *("kill rank", "kill launcher", "stop one", "corrupt newest checkpoint", "full disk") * 2,
    *("kill rank", "kill launcher", "stop one", "stop twice"),
    *("stop in a save", "stop in a save", "kill in a save", "outage", "long outage", "hang"),
)
OUTAGE_S, LONG_OUTAGE_S = 5.0, 60.0
"""The long one outlasts the retries of a request, which wait for about 15 s in all: it stands for a minute or an hour."""
HANG_S = 40
_PATIENCE_S = 900
_SEED = int(os.environ.get("SOAK_SEED", "0"))
_SAVING = rf"PUT .*/{STAGE}/checkpoints/step-\d+/rank-"
_STEPS = 40  # of the run, for each fault: it must not be over before the day is, also where it trains on through an outage


def the_day(rng: random.Random) -> list[str]:
    """All faults in random order, or those that SOAK_FAULTS names, separated by commas."""
    named = os.environ.get("SOAK_FAULTS")
    return named.split(",") if named else rng.sample(DAY, len(DAY))


@dataclass
class Day:
    """The disturbed run and what happens to it."""

    job: Gang
    proxy: FaultProxy
    rng: random.Random

    @property
    def saved(self) -> int:
        """Step of the newest checkpoint."""
        return ledger.newest_checkpoint(self.job.run, STAGE)

    def wait(self, reached: Callable[[], bool], what: str) -> None:
        """Wait for something in a job that must not end before."""
        deadline = time.monotonic() + _PATIENCE_S
        while not reached():
            assert not self.job.ended(), f"the job ended while the test waited for {what}"
            assert time.monotonic() < deadline, f"{what} did not come"
            time.sleep(0.1)

    @contextmanager
    def a_save(self) -> Iterator[None]:
        """Reached while a rank's checkpoint is on its way, and slow."""
        before = len(self.proxy.injected)
        self.proxy.rules = [Rule(_SAVING, "slow", -1, bytes_per_s=20_000)]
        self.wait(lambda: len(self.proxy.injected) > before, "a save")
        yield
        self.proxy.rules = []

    def outage(self, seconds: float) -> None:
        """No request is answered well; half of them not at all."""
        self.proxy.rules = [Rule("", self.rng.choice(["503", "reset", "500"]), -1)]  # type: ignore[arg-type]
        time.sleep(seconds)
        self.proxy.rules = []

    def strike(self, fault: str) -> str:
        """Do it. Returns where."""
        node = self.rng.randrange(gang.NODES)
        launcher, ranks = self.job.launchers[node].pid, self.job.ranks(node)
        rank = self.rng.choice(ranks)
        match fault:
            case "kill rank":
                send(rank, signal.SIGKILL)
            case "kill launcher" | "corrupt newest checkpoint":
                send(launcher, signal.SIGKILL)
            case "stop one":
                send(launcher, self.rng.choice([signal.SIGUSR2, signal.SIGTERM]))
            case "stop twice":
                send(launcher, signal.SIGUSR2)
                time.sleep(0.3)
                send(self.job.launchers[1 - node].pid, signal.SIGTERM)
            case "stop in a save":
                with self.a_save():
                    send(launcher, signal.SIGUSR2)
            case "kill in a save":
                with self.a_save():
                    send(rank, signal.SIGKILL)
            case "outage":
                self.outage(OUTAGE_S)
            case "long outage":
                self.outage(LONG_OUTAGE_S)
            case "full disk":
                self.job.fill_disk(node)
            case "hang":
                send(rank, signal.SIGSTOP)
            case _:
                raise AssertionError(fault)
        return f"node {node}"

    def meet(self, fault: str) -> None:
        """One fault: strike once the job has saved something, see it end (or get over it), and start again if the ledger says so."""
        before = self.saved
        self.wait(lambda: self.saved > before, "a checkpoint")
        time.sleep(self.rng.uniform(0, 1))
        at, started = self.saved, time.monotonic()
        where = self.strike(fault)
        if ("outage" in fault or fault == "full disk") and self._gets_over_it():
            if fault == "full disk":  # checkpoints go to S3 out of memory: only a shard that is not there yet needs room
                self.job.empty_disk(int(where.removeprefix("node ")))
            self.note(f"| {fault} | {where} | after {at} | lived through it |  | {time.monotonic() - started:.0f} |")
            return
        found = self.job.finish(_PATIENCE_S)
        seconds = time.monotonic() - started
        self.note(f"| {fault} | {where} | after {at} | {found.code} | {found.reason[:160]} | {seconds:.0f} |")
        assert found.code == ExitCode.REQUEUE, f"{fault}: {found}"
        attempts = ledger.read(self.job.run, STAGE)
        if fault.startswith("stop"):
            assert attempts[-1].code == ExitCode.REQUEUE, attempts[-1]
        if fault == "corrupt newest checkpoint":
            corrupt(self.job.run, self.saved)
        self.job.start()

    def note(self, row: str) -> None:
        """A row of the day's table."""
        print(row, flush=True)  # as it comes: a day is long

    def _gets_over_it(self) -> bool:
        """Whether the job saves again before it ends, if it does: retries and their end take their time. A full disk is met at the next shard, or never."""
        before, deadline = self.saved, time.monotonic() + _PATIENCE_S
        while self.saved == before and not self.job.ended():
            assert time.monotonic() < deadline, "neither an end nor a checkpoint after an outage"
            time.sleep(0.2)
        return not self.job.ended()


def corrupt(run: RunFolder, step: int) -> None:
    """Flip a byte of a checkpoint."""
    url = run.at(STAGE, "checkpoints", f"step-{step:08d}", "rank-1.bin")
    data = bytearray(storage.read_bytes(url))
    data[len(data) // 2] ^= 1
    storage.write_bytes(url, bytes(data))


def prepared(roots: list[str], steps: int, folder: Path) -> list[RunFolder]:
    """Run folders with the same images: prepared once, and copied."""
    words = [f"{STAGE}_fit.{key}={value}" for key, value in {"steps": steps, "save_every": 5, "eval_every": steps, "precision": "fp32"}.items()]
    command = [sys.executable, str(gang.ROOT / "launcher.py"), "prepare", "tiny", f"run.root={folder}", *words, "--nproc", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=_PATIENCE_S)
    config = storage.read_json(str(folder / "tiny" / "config.json"))
    runs = [RunFolder(storage.join(root, "tiny")) for root in roots]
    for root, run in zip(roots, runs, strict=True):
        storage.upload_folder(folder / "tiny", run.url)
        storage.write_json(run.config_url, config | {"run": config["run"] | {"root": root}})
    return runs


def end_state(run: RunFolder) -> tuple[list[tuple[int, float]], dict[str, list[str]], str]:
    """Every loss, the hash of every tensor of the last checkpoint, the identity of the weights."""
    losses = [(point.step, point.value) for point in read_metrics(run.url, STAGE)["train/loss"]]
    found = hashes(run.at(STAGE, "checkpoints", f"step-{losses[-1][0]:08d}"))
    return losses, found, storage.read_json(run.at(STAGE, "export", "config.json"))["content_hash"]


@pytest.mark.soak
def test_twenty_faults_in_a_day_change_nothing(s3: str, s3_server: S3Server, tmp_path: Path) -> None:
    if not gang.available():
        pytest.skip("no mount namespaces: this test needs root and unshare")
    assert len(DAY) == 20
    rng = random.Random(_SEED)
    faults = the_day(rng)
    stormy, calm = prepared([f"{s3}/{name}" for name in ("stormy", "calm")], _STEPS * len(faults), tmp_path / "prepared")
    with fault_proxy(s3_server.endpoint) as proxy:
        environment = {"S3_ENDPOINT_URL": proxy.endpoint, "LAUNCHER_HANG_S": str(HANG_S), "OMP_NUM_THREADS": "1"}
        day = Day(Gang(stormy, STAGE, environment, tmp_path), proxy, rng)
        begun = time.monotonic()
        try:
            print("| fault | where | step | end | reason | s |", flush=True)
            day.job.start()
            for fault in faults:
                day.meet(fault)
            assert day.job.finish(2 * _PATIENCE_S).code == ExitCode.DONE
            day.note("| the day is over |  |  | 0 |  |  |")
        except BaseException:
            print(*((tmp_path / f"node-{node}.log").read_text()[-6000:] for node in range(gang.NODES)), sep="\n=====\n")
            raise
        finally:
            day.job.kill()
            proxy.rules = []
        stormy_s = time.monotonic() - begun
    quiet = Gang(calm, STAGE, {"OMP_NUM_THREADS": "1"}, tmp_path / "calm")
    quiet.folder.mkdir()
    begun = time.monotonic()
    try:
        quiet.start()
        assert quiet.finish(2 * _PATIENCE_S).code == ExitCode.DONE
    finally:
        quiet.kill()
    calm_s = time.monotonic() - begun
    assert end_state(stormy) == end_state(calm)
    losses = end_state(calm)[0]
    assert [step for step, _ in losses] == list(range(1, losses[-1][0] + 1))
    words = [line for node in range(gang.NODES) for line in (tmp_path / f"node-{node}.log").read_text().splitlines() if ": goodput " in line]
    print(*words, f"goodput of the day: {calm_s / stormy_s:.0%}: {calm_s:.0f} s of undisturbed work in {stormy_s:.0f} s", sep="\n")
    assert read_metrics(stormy.url, STAGE)["goodput/share"][-1].value > 0
