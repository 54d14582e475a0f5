"""What a job asks of the storage does not grow with nodes times ranks: counted at a proxy, and by files for as many ranks as no test can start. About 20 s."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.shards.shard_set import IMAGE_SCHEMA, open_set
from infra import ledger, node_folder, storage
from infra.errors import DataError, DivergedError, UnreachableError
from infra.exit_records import summary
from infra.node_folder import read_once
from infra.run_folder import RunFolder
from infra.world import World
from tests.support.counted_requests import told_apart
from tests.support.fault_proxy import FaultProxy, fault_proxy
from tests.support.made_sets import image, make_images
from tests.support.ranks import run_in_ranks
from tests.support.root import ROOT
from tests.support.s3_server import S3Server
from train.engines import replicated
from train.planning import requests
from train.run.cluster import Start, verdict
from train.weights import checkpoint
from train.weights.fragments import even_slice

SIZES = (1, 2, 4)
_NODES, _RANKS, _ATTEMPTS = 128, 8, 30


@pytest.fixture
def proxy(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:  # after s3, which names the server itself
    with fault_proxy(s3_server.endpoint) as made:
        monkeypatch.setenv("S3_ENDPOINT_URL", made.endpoint)
        yield made


_AGENT = """
import sys
sys.path.insert(0, {root!r})
from infra import agent
from infra.run_folder import RunFolder
from infra.signals import StopFlag
for ranks in {sizes}:
    ended = agent.run_ranks([{rank!r}], agent.Placement(ranks), RunFolder({run!r}), f"dvae-{{ranks}}", StopFlag())
    print(*ended)
"""
_RANK = """
import os, sys
sys.path.insert(0, {root!r})
from infra.run_folder import RunFolder
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
code = 65 if rank == 3 else 75
RunFolder({run!r}).record_exit(f"dvae-{{size}}", int(os.environ["LAUNCHER_ATTEMPT"]), rank, code, "bad data" if code == 65 else "saved")
sys.exit(code)
"""


def test_the_ledger_costs_a_node_as_much_with_one_rank_as_with_four_and_a_fault_one_record_more(proxy: FaultProxy, s3: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK.format(root=str(ROOT), run=s3))
    words = _AGENT.format(root=str(ROOT), rank=str(tmp_path / "rank.py"), run=s3, sizes=SIZES)
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.splitlines() == ["75 saved", "75 saved", "65 rank 3: bad data"]
    counts = {ranks: Counter(told_apart([line for line in proxy.requests if f"dvae-{ranks}" in line])) for ranks in SIZES}
    of_ledger = {ranks: {verb: count for (kind, verb), count in found.items() if kind == "ledger"} for ranks, found in counts.items()}
    assert of_ledger[1] == of_ledger[2] == {"LIST": 2, "GET": 1, "PUT": 3}, "begin, summary and end; the attempts, the records; the summary"
    assert of_ledger[4] == {"LIST": 2, "GET": 2, "PUT": 4}
    names = storage.list_level(f"{s3}/exits/dvae-4/attempt-0")
    assert names == ["begin.json", "end.json", "node-0.json", "rank-3.json"]


def crashed(run: RunFolder, number: int, *, older: bool = False) -> None:
    """An attempt of 1,024 ranks, of which one crashed; ``older``: as ranks left it before their nodes summed them up."""
    folder = Path(run.url, "exits", "dalle", f"attempt-{number}")
    folder.mkdir(parents=True)
    begin = {"time": 1.0, "size": _NODES * _RANKS, "restart": number, "run_id": f"7.{number}", "saved": number}
    (folder / "begin.json").write_text(json.dumps(begin))
    for node in range(_NODES):
        left = [{"rank": node * _RANKS + i, "code": 75, "reason": "saved", "time": 2.0 + i} for i in range(_RANKS) if node or i]
        if older:
            for record in left:
                (folder / f"rank-{record['rank']}.json").write_text(json.dumps(record))
        else:
            (folder / f"node-{node}.json").write_text(json.dumps(summary(node, _RANKS, left)))
    (folder / "rank-0.json").write_text(json.dumps({"rank": 0, "code": 1, "reason": f"boom {number}", "time": 1.5}))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests that a run folder on S3 would get."""
    counts: Counter[str] = Counter()
    for module, name in ((storage, "read_at_most"), (storage, "list_level"), (storage, "list_files"), (storage, "exists"), (storage, "write_bytes")):
        real = getattr(module, name)

        def counted(*words: object, _real: object = real, _name: str = name) -> object:
            counts[_name] += 1
            return _real(*words)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    return counts


def test_a_restart_of_1024_ranks_reads_as_much_after_30_attempts_as_after_one(tmp_path: Path, looked: Counter[str]) -> None:
    run, counts = RunFolder(str(tmp_path)), []
    for number in range(_ATTEMPTS):
        crashed(run, number)
        checkpoint_folder = tmp_path / "dalle" / "checkpoints" / f"step-{number:08d}"
        checkpoint_folder.mkdir(parents=True)
        (checkpoint_folder / "meta.json").touch()
        looked.clear()
        ledger.refuse_a_crash_loop(run, "dalle", number + 1, 3)
        counts.append(dict(looked))
    assert counts[1] == counts[-1], "every attempt moved a checkpoint: the one before decides nothing"
    assert counts[-1]["read_at_most"] <= _NODES + 1 + 5 and counts[-1]["list_level"] <= 3 and not counts[-1].get("list_files")
    looked.clear()
    ledger.refuse_a_crash_loop(run, "dalle", _ATTEMPTS, 3)
    assert looked["read_at_most"] <= 5, "what was found is written down"
    end = json.loads((tmp_path / "exits/dalle/attempt-7/end.json").read_text())
    assert (end["code"], end["reason"], end["ended"]) == (1, "rank 0: boom 7", 1.5)


def test_an_attempt_whose_ranks_each_left_a_record_is_read_as_before(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for number, older in enumerate((True, False)):
        crashed(run, number, older=older)
    first, second = ledger.read(run, "dalle")
    assert (first.code, first.reason.replace("0", "1")) == (second.code, second.reason.replace("0", "1")) == (1, "rank 1: boom 1")
    assert [record["time"] for record in run.records("dalle", 0)] == [record["time"] for record in run.records("dalle", 1)]


def test_every_end_is_told_apart_as_when_each_rank_wrote_its_own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The root cause over all ends of two nodes with two ranks each; None is a rank that was killed."""
    ends = (0, 75, 1, 65, 93, None)
    cases = [(a, b, c, d) for a in ends for b in ends for c in (0, 75, 1, None) for d in (75, 93, None)]
    for case in cases:
        own, summed = (RunFolder(str(tmp_path / kind / "-".join(map(str, case)))) for kind in ("own", "summed"))
        records = [{"rank": r, "code": code, "reason": f"reason {r}", "time": 5.0 - r} for r, code in enumerate(case) if code is not None]
        for run in (own, summed):
            Path(run.attempt_url("dvae", 0)).mkdir(parents=True)
        for record in records:
            alike = record["code"] in (0, 75)
            for run in (own,) if alike else (own, summed):
                Path(run.attempt_url("dvae", 0, f"rank-{record['rank']}.json")).write_text(json.dumps(record))
        for node in (0, 1):
            left = [record for record in records if record["rank"] in (2 * node, 2 * node + 1) and record["code"] in (0, 75)]
            Path(summed.attempt_url("dvae", 0, f"node-{node}.json")).write_text(json.dumps(summary(node, 2, left)))
        assert own.root_cause("dvae", 0, 4) == summed.root_cause("dvae", 0, 4), case


def save_and_load(world: World, url: str, node: str) -> list[float]:
    """As a stage does: a save, and in the next start what is restored."""
    os.environ["LAUNCHER_NODE_FOLDER"] = node
    tensor = torch.arange(64, dtype=torch.float32)
    for step in (5, 10):
        checkpoint.save(url, step, {"model/w": even_slice(tensor + step, world.rank, world.size)}, {"shapes": {}}, world, keep=1)
    target = even_slice(torch.zeros(64), world.rank, world.size)
    meta = checkpoint.load_newest(url, {"model/w": target}, world)
    assert meta is not None and meta["step"] == 10
    return [float(value) for value in target.tensor]


@pytest.mark.parametrize("ranks", SIZES)
def test_a_checkpoint_costs_a_node_what_its_tensors_do_and_what_planning_says(proxy: FaultProxy, s3: str, tmp_path: Path, ranks: int) -> None:
    parts = run_in_ranks(save_and_load, ranks, s3, str(tmp_path)) if ranks > 1 else [one_rank(s3, tmp_path)]
    assert [value for part in parts for value in part] == [value + 10 for value in range(64)]
    found = Counter({verb: count for (_, verb), count in told_apart(proxy.requests).items()})
    reads = [line for line in proxy.requests if line.startswith("GET") and "list-type" not in line]
    assert sum("index.json" in line for line in reads) == 1 and sum("meta.json" in line for line in reads) == 1, "once a node, once a job"
    saves, restore = requests.save(1, ranks, kept=1), requests.restore(1, ranks, kept=1)
    assert found["PUT"] == 2 * saves.put and found["GET"] == restore.get, found
    assert found["LIST"] <= 2 * saves.list + restore.list and found["HEAD"] <= 2 * saves.head + restore.head, found


def one_rank(url: str, folder: Path) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAUNCHER_NODE_FOLDER", str(folder))
        return save_and_load(World.single(), url, str(folder))


def test_a_file_that_cannot_be_read_is_asked_for_once_a_node_and_is_the_same_error_for_all(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAUNCHER_NODE_FOLDER", str(tmp_path))
    asked: list[str] = []

    def fails(url: str, most: int) -> bytes:
        asked.append(url)
        raise UnreachableError(f"{url}: failed after 6 attempts")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_at_most", fails)
        for _ in range(3):
            with pytest.raises(UnreachableError, match=r"config\.json: failed after 6 attempts"):
                read_once(f"{s3}/config.json", 100)
    assert len(asked) == 1
    monkeypatch.delenv("LAUNCHER_NODE_FOLDER")
    storage.write_bytes(f"{s3}/a", b"12345")
    with node_folder.shared():
        assert read_once(f"{s3}/a", 5) == b"12345"
        storage.write_bytes(f"{s3}/a", b"other")
        assert read_once(f"{s3}/a", 5) == b"12345", "as long as the attempt lasts"
    assert read_once(f"{s3}/a", 5) == b"other"
    with pytest.raises(DataError, match="larger than 4 bytes"):
        read_once(f"{s3}/a", 4)


_FULL = """
import os, resource, sys
sys.path.insert(0, {root!r})
from infra import node_folder
asked = []
def produce():
    asked.append(1)
    return b"x" * 100_000
with node_folder.shared():
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))  # as a full disk does: what is written comes to an end
    found = [node_folder.once("index", produce) for _ in range(3)]
print(len(asked), [len(each) for each in found])
"""


def test_where_the_node_has_no_room_for_it_each_rank_fetches_for_itself() -> None:
    done = subprocess.run([sys.executable, "-c", _FULL.format(root=str(ROOT))], capture_output=True, text=True, check=True)
    assert done.stdout == "3 [100000, 100000, 100000]\n"


def opened(world: World, url: str, version: str, node: str) -> tuple[int, int, int]:
    """As every rank of a stage opens a set: its shards, what is left out of them, and what was taken down."""
    os.environ["LAUNCHER_NODE_FOLDER"] = node
    found = open_set(url, IMAGE_SCHEMA, version=version, takedown=f"{url}/list.txt")
    return len(found.shards), found.count, len(found.taken_down)


@pytest.mark.parametrize("ranks", SIZES)
def test_the_index_of_a_set_is_read_once_a_node(proxy: FaultProxy, s3: str, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_images(f"{s3}/set", [[image(number) for number in range(start, start + 20)] for start in (0, 20)], excluded=[3])
    storage.write_bytes(f"{s3}/set/list.txt", b"id-5\n")
    proxy.requests.clear()
    (tmp_path / "node").mkdir()
    words = (f"{s3}/set", made.content_hash, str(tmp_path / "node"))
    monkeypatch.setenv("LAUNCHER_NODE_FOLDER", "")  # whatever one rank, in this process, sets is undone
    found = run_in_ranks(opened, ranks, *words) if ranks > 1 else [opened(World.single(), *words)]
    assert len(set(found)) == 1 and found[0][1:] == (38, 1)
    reads = Counter(line.rpartition("/")[2].partition("?")[0] for line in proxy.requests if line.startswith("GET") and "list-type" not in line)
    assert {name: reads[name] for name in ("manifest.json", "index.json", "excluded.u64", "list.txt")} == {
        "manifest.json": 1,
        "index.json": 1,
        "excluded.u64": 1,
        "list.txt": 1,
    }, reads
    assert reads["ids.u64"] == 2 and not any(line.startswith("HEAD") for line in proxy.requests), "each part's, once"


def test_replicas_cut_a_checkpoint_into_no_more_parts_than_few_of_them_write() -> None:
    cuts = [replicated.writers_cut(World(rank, 1024, rank % 8, 8)) for rank in range(1024)]
    sizes = [even_slice(torch.zeros(1001), *cut).tensor.numel() for cut in cuts]
    assert sum(sizes) == 1001 and all(sizes[: replicated.WRITERS]) and not any(sizes[replicated.WRITERS :])
    assert [replicated.writers_cut(World(rank, 4, rank, 4)) for rank in range(4)] == [(rank, 4) for rank in range(4)]


def test_starts_that_move_no_checkpoint_come_to_an_end_however_they_are_stopped(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for restart in range(ledger.STOPS + 1):
        number = run.begin_attempt("dvae", size=1, restart=restart, run_id=f"7.{restart}", saved=-1)
        run.record_exit("dvae", number, 0, 75, "SIGUSR2 before the ranks were started")
        attempts = ledger.decisive(run, "dvae", -1)
        last = ledger.judge(attempts, -1, 3, ledger.STOPS)
        assert last.code == (75 if restart < ledger.STOPS else 93), restart
        assert ledger.judge(attempts, restart, 3, ledger.STOPS).code == 75, "one that moved a checkpoint is progress"
        assert ledger.judge(attempts, -1, 3).code == 75, "a stage without checkpoints is not judged by them"
    assert "11 starts in a row moved no checkpoint, the last: SIGUSR2" in last.reason and "the time limit" in last.reason
    with pytest.raises(DivergedError, match=r"11 starts in a row moved no checkpoint.*not started again"):
        ledger.refuse_a_crash_loop(run, "dvae", ledger.STOPS + 1, 3, ledger.STOPS)
    ledger.refuse_a_crash_loop(run, "dvae", ledger.STOPS + 1, 3)


def test_starts_that_are_stopped_before_they_begin_an_attempt_come_to_an_end_too(tmp_path: Path) -> None:
    """As where a time limit is not longer than the signal before it: there is nothing in the ledger."""
    run = RunFolder(str(tmp_path))
    codes = [verdict("dvae", run, Start("7", restart, 75), 3).code for restart in range(ledger.STOPS + 2)]
    assert codes == [75] * ledger.STOPS + [93, 93]
    assert "stopped 11 times in a row before an attempt was begun: the time limit" in verdict("dvae", run, Start("7", ledger.STOPS, 75), 3).reason
    run.begin_attempt("dvae", size=1, restart=5, run_id="7.5", saved=-1)
    assert verdict("dvae", run, Start("7", ledger.STOPS, 75), 3).code == 75, "five since the last that began one"
    assert verdict("prepare", run, Start("7", 99, 75), 3).code == 75, "a stage without checkpoints goes on by its parts"
