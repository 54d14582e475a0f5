"""Shared memory: room is checked before it is needed, and cleaning removes what is ours and dead, nothing else."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from data_pipeline.loading import shared_memory
from data_pipeline.loading.shared_memory import SEGMENTS, Claim, check_room, clean_stale
from infra.errors import ConfigError
from infra.world import World
from tests.support.ranks import ROOT


@pytest.fixture(autouse=True)
def own_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims of these tests lie in a folder of their own: no running loader of this machine is seen."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def other_job() -> Iterator[SharedMemory]:
    """A segment named as streaming names those of another job."""
    segment = SharedMemory(f"{secrets.randbelow(900_000):06}_locals", create=True, size=64)
    yield segment
    segment.close()
    if Path(SEGMENTS, segment.name).exists():
        segment.unlink()


HOLDER = """
import sys, time
from pathlib import Path
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from data_pipeline.loading.shared_memory import Claim
from infra.world import World
resource_tracker.register = lambda *_: None  # which would clean up where the whole process group is not killed
claim = Claim(World.single(), int(sys.argv[1]), Path(sys.argv[2]))
segment = SharedMemory(f"{claim.number:06}_shard_states", create=True, size=64)
claim.cache.mkdir(parents=True)
(claim.cache / "shard.00000.mds").write_bytes(b"cached")
print(claim.key, flush=True)
time.sleep(600)
"""


def holder(serial: int, cache: Path) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(serial), str(cache)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def names(key: str) -> list[str]:
    return [path.name for path in SEGMENTS.glob(f"{int(key, 16):06}_*")]


def test_cleaning_removes_what_a_killed_loader_left_and_nothing_of_other_jobs(tmp_path: Path, other_job: SharedMemory) -> None:
    cache = tmp_path / "cache"
    (dead, dead_key), (alive, alive_key) = holder(1, cache), holder(2, cache)
    try:
        dead.send_signal(signal.SIGKILL)
        dead.wait()
        assert len(names(dead_key)) == len(names(alive_key)) == 1 and len(list(cache.iterdir())) == 2
        assert clean_stale() == [dead_key]
        assert not names(dead_key) and not (cache / f"loader-{dead_key}").exists()
        assert names(alive_key) and (cache / f"loader-{alive_key}" / "shard.00000.mds").exists(), "it is in use"
        assert Path(SEGMENTS, other_job.name).exists(), "it is not ours"
        assert clean_stale() == []
    finally:
        alive.kill()
        alive.wait()
    Claim(World.single(), 3).release()  # the next loader that starts cleans up by itself
    assert not names(alive_key) and not list(cache.iterdir())


def test_a_claim_is_named_by_its_group_and_loader() -> None:
    world = World(1, 2, 1, 2)  # not the node's first rank: it takes nothing
    a, again, b, other_node = Claim(world, 0), Claim(world, 0), Claim(world, 1), Claim(World(3, 4, 1, 2), 0)
    assert a.key == again.key and len({a.key, b.key, other_node.key}) == 3
    assert a.number > 1_000_000, "streaming counts from 0, where other jobs' names are"


def test_a_claim_is_given_back_with_all_it_stands_for(tmp_path: Path) -> None:
    claim = Claim(World.single(), 5, tmp_path / "cache")
    assert claim.cache is not None and claim.cache.name == f"loader-{claim.key}"
    claim.cache.mkdir(parents=True)
    (tmp_path / "cache" / "somebody else's").mkdir()
    lock = tmp_path / f"{claim.number:06}_cache_filelock"
    lock.touch()
    claim.release()
    claim.release()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["somebody else's"] and not lock.exists()
    assert not list((tmp_path / f"loader-claims-{os.getuid()}").iterdir())


def test_a_claim_that_names_a_foreign_folder_removes_none(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    folder = tmp_path / f"loader-claims-{os.getuid()}"
    folder.mkdir()
    for key, text in (("0" * 12, f'{{"cache": "{precious}"}}'), ("1" * 12, "not JSON"), ("2" * 12, "")):
        (folder / key).write_text(text)
    assert len(clean_stale()) == 3 and precious.exists()


def test_a_second_job_with_the_same_identity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "PATIENCE_S", 0.1)
    monkeypatch.setenv("MASTER_PORT", "29500")
    world = World(0, 2, 0, 2)
    first = Claim(world, 0)
    with pytest.raises(ConfigError, match=r"is held by a running process: another job .* \(.*:29500\); start jobs through launcher.py"):
        Claim(world, 0)
    first.release()
    Claim(world, 0).release()


def test_too_little_shared_memory_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_room()
    monkeypatch.setattr(shared_memory, "_free_bytes", lambda: 5 << 20)
    with pytest.raises(
        ConfigError, match=r"/dev/shm has 5 MiB free, but the state of the loaders need 8 MiB; give it more room: docker run --shm-size=16g"
    ):
        check_room()
    with pytest.raises(ConfigError, match=r"but the batches need 64 MiB"):
        check_room(64 << 20, "the batches")
    monkeypatch.setattr(shared_memory, "SEGMENTS", tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"missing does not exist, and loaders need it; mount a tmpfs there: mount -t tmpfs"):
        check_room()
    monkeypatch.setattr(shared_memory, "SEGMENTS", tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"cannot be written, and loaders need it"):
        check_room()


def test_the_room_is_that_of_the_file_system() -> None:
    found = os.statvfs(SEGMENTS)
    assert abs(shared_memory._free_bytes() - found.f_bavail * found.f_frsize) < 1 << 30
