"""The agent when a peer or the storage goes away: two agents with a rank each on this machine, and a real S3 server. About 40 s."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra import interfaces, meeting, storage
from infra.agent import TRACKER_NOTES, Placement
from infra.errors import LostPeerError, StopRequested, UnreachableError
from infra.job import Job
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from tests.support.s3_server import S3Server
from train import attempt as attempt_module
from train.config import load_run

_PATIENCE_S = 120
_RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from infra import signals
from infra.run_folder import RunFolder
flag, run = signals.install(), RunFolder({run!r})
signals.die_with_parent(os.getppid())  # as real ranks do
open({run!r} + "/rank-" + os.environ["RANK"] + "-is-up", "w").close()
while not flag:
    time.sleep(0.05)
run.record_exit("dvae", int(os.environ["LAUNCHER_ATTEMPT"]), int(os.environ["RANK"]), 75, "stopped")
sys.exit(75)
"""
_REDUCES = """
import os, sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
from infra.run_folder import RunFolder
dist.init_process_group("gloo")
total = torch.ones(())
dist.all_reduce(total)
print("the sum is", int(total), "of ranks that met at [" + os.environ["MASTER_ADDR"].strip("[]") + "]", flush=True)
RunFolder({run!r}).record_exit("dvae", int(os.environ["LAUNCHER_ATTEMPT"]), int(os.environ["RANK"]), 0, "finished")
dist.destroy_process_group()
"""
_CUT_OFF = """
import os, sys
sys.path.insert(0, {root!r})
from infra import s3
from infra.run_folder import RunFolder
s3.MAX_ATTEMPTS = 1
RunFolder({run!r}).record_exit("dvae", int(os.environ["LAUNCHER_ATTEMPT"]), 0, 93, "diverged")
sys.exit(93)
"""
_AGENT = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from infra import agent, deferred_writes, meeting, s3
from infra.errors import ReportedError
from infra.job import Job
from infra.run_folder import RunFolder
from infra.signals import StopFlag
agent._LOST_S, deferred_writes.PATIENCE_S, s3.MAX_ATTEMPTS, meeting._LOOK_S = 1, 0.0, 2, 2.0
node, nodes, error = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if error:
    import torch.distributed.launcher.api as api
    from torch.distributed.elastic.rendezvous import api as rendezvous
    def fail(*arguments):
        if error == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            while True:
                time.sleep(0.01)  # until it is heard
        if error != "afterwards":
            raise getattr(rendezvous, error)("as if")
    api.elastic_launch = lambda *arguments: fail
try:
    job = Job("7", 0, node, nodes, "{place}", "{host}")
    stop = StopFlag()
    if error == "at once":
        stop.handle(signal.SIGTERM, None)
    ended = agent.run_ranks([{rank!r}], agent.Placement(1, job), RunFolder({run!r}), "dvae", stop)
    if error == "afterwards":
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop:
            time.sleep(0.01)
    print("ended:", *ended, *(["by", stop.received.name] if stop else []))
except ReportedError as error:
    print("ended:", int(error.exit_code), error)
"""


def agent(
    tmp_path: Path, port: int, node: int, nodes: int = 2, error: str = "", run: str = "", program: str = _RANK, host: str = "127.0.0.1"
) -> subprocess.Popen[str]:
    """A process with the agent of one node, whose ranks wait for a signal; ``error``: elastic ends with it instead."""
    places = {
        "root": str(ROOT),
        "run": run or str(tmp_path),
        "rank": str(tmp_path / "rank.py"),
        "place": interfaces.endpoint(host, port),
        "host": host,
    }
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "rank.py").write_text(program.format(**places))
    words = [sys.executable, "-c", _AGENT.format(**places), str(node), str(nodes), error]
    variables = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}  # said, so that nobody has to find out and say so
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(("host", "family"), [("::1", socket.AF_INET6)], ids=["an IPv6 literal"])
def test_ranks_of_two_nodes_reduce_together_where_the_port_is_in_use_and_the_address_is_a_literal_of_ipv6(
    tmp_path: Path, host: str, family: socket.AddressFamily
) -> None:
    """All the way: the launchers' meeting, elastic's rendezvous, and the ranks' own process group."""
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        agents = [agent(tmp_path, port, node, program=_REDUCES, host=host) for node in range(2)]
        try:
            said = [each.communicate(timeout=_PATIENCE_S)[0] for each in agents]
        finally:
            for each in agents:
                each.kill()
                each.communicate()
    assert f"port {port} is in use on node 0 ({host}) by another program or job; the next one is tried" in said[0], said
    lines = [line for output in said for line in output.splitlines() if "the sum" in line or line.startswith("ended")]
    assert lines == [line for rank in range(2) for line in (f"[rank {rank}] the sum is 2 of ranks that met at [::1]", "ended: 0 finished")], said
    begin = json.loads((tmp_path / "exits/dvae/attempt-0/begin.json").read_text())
    assert begin["rendezvous"].startswith(f"[{host}]:") and int(begin["rendezvous"].rpartition(":")[2]) > port


def test_the_node_that_is_left_says_that_the_rendezvous_went_away_and_ends_its_ranks(tmp_path: Path) -> None:
    port = free_port()
    agents = [agent(tmp_path, port, node) for node in range(2)]
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while len(list(tmp_path.glob("rank-*-is-up"))) < 2:
            assert time.monotonic() < deadline and all(each.poll() is None for each in agents), "the ranks did not start"
            time.sleep(0.1)
        agents[0].kill()
        output = agents[1].communicate(timeout=_PATIENCE_S)[0]
    finally:
        for each in agents:
            each.kill()
            each.communicate()
    assert output == (
        f"ended: 1 node 0's rendezvous at 127.0.0.1:{port} went away (RendezvousConnectionError): its launcher was killed, or the network between "
        "the nodes is broken; rank 0 ended without a record: it was killed\n"
    )
    assert RunFolder(str(tmp_path)).records("dvae", 0)[0]["code"] == 75, "its own rank was told to stop, and not left behind"


def test_a_job_that_is_resumed_under_its_old_id_joins_no_old_attempt(tmp_path: Path) -> None:
    """As on Kubernetes, where neither the id nor the count of restarts changes."""
    run = RunFolder(str(tmp_path))
    assert run.begin_attempt("dvae", size=2, run_id="7.0", saved=-1) == 0
    port = free_port()
    late = agent(tmp_path, port, 1)
    time.sleep(1)  # the other node comes first, and finds only what lies there
    both = [agent(tmp_path, port, 0), late]
    try:
        deadline = time.monotonic() + 3 * _PATIENCE_S
        while len(list(tmp_path.glob("rank-*-is-up"))) < 2:
            assert time.monotonic() < deadline and all(each.poll() is None for each in both), "the ranks did not start"
            time.sleep(0.1)
        for each in both:  # these ranks agree on nothing: each is told
            each.terminate()
        assert [each.communicate(timeout=_PATIENCE_S)[0].split(" by ")[0].strip() for each in both] == ["ended: 75 stopped"] * 2
    finally:
        for each in both:
            each.kill()
            each.communicate()
    assert [len(run.records("dvae", attempt)) for attempt in (0, 1)] == [0, 2]


def test_a_stop_signal_reaches_the_ranks_and_the_callers_flag(tmp_path: Path) -> None:
    process = agent(tmp_path, free_port(), 0, nodes=1)
    deadline = time.monotonic() + _PATIENCE_S
    while not (tmp_path / "rank-0-is-up").exists():
        assert time.monotonic() < deadline and process.poll() is None, "the rank did not start"
        time.sleep(0.1)
    process.terminate()
    assert process.communicate(timeout=_PATIENCE_S)[0] == "ended: 75 stopped by SIGTERM\n"


@pytest.mark.parametrize("moment", ["at once", "SIGTERM"])
def test_a_stop_signal_before_there_are_ranks_starts_none_and_is_no_crash(tmp_path: Path, moment: str) -> None:
    process = agent(tmp_path, free_port(), 0, nodes=1, error=moment)
    assert process.communicate(timeout=_PATIENCE_S)[0] == "ended: 75 SIGTERM before the ranks were started by SIGTERM\n"
    assert not (tmp_path / "rank-0-is-up").exists()


def test_a_stop_signal_after_the_ranks_sets_the_callers_flag(tmp_path: Path) -> None:
    process = agent(tmp_path, free_port(), 0, nodes=1, error="afterwards")
    assert process.communicate(timeout=_PATIENCE_S)[0] == "ended: 1 rank 0 ended without a record: it was killed by SIGTERM\n"


def test_nodes_that_do_not_meet_are_named_and_one_node_blames_no_other(tmp_path: Path) -> None:
    apart, alone = (
        agent(tmp_path / "apart", 1234, 0, error="RendezvousTimeoutError"),
        agent(tmp_path / "alone", 1234, 0, 1, "RendezvousConnectionError"),
    )
    said = f"the 2 nodes of job 7.0 did not meet at 127.0.0.1:1234 within {meeting.RENDEZVOUS_S} s: node 1 did not start, or cannot reach it."
    assert apart.communicate(timeout=_PATIENCE_S)[0] == f"ended: 1 {said}\n"
    assert "RendezvousConnectionError: as if" in alone.communicate(timeout=_PATIENCE_S)[0].splitlines()[-1] and alone.returncode == 1


@pytest.mark.parametrize("away", [1, -1], ids=["until the rank has ended", "for good"])
def test_what_a_rank_could_not_record_in_an_outage_is_recorded_by_its_agent(
    s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: int
) -> None:
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        proxy.rules = [Rule(r"PUT .*/rank-0\.json", "503", away)]
        output = agent(tmp_path, 1234, 0, nodes=1, run=s3, program=_CUT_OFF).communicate(timeout=_PATIENCE_S)[0]
        assert proxy.injected
    if away == 1:
        assert output == "ended: 93 rank 0: storage unreachable: diverged\n"
    else:
        assert output.startswith("ended: 1 storage unreachable: s3://") and "answered SlowDown" in output
        assert output.endswith(" Not recorded: rank 0 ended with 93, diverged; how the ranks of node 0 ended\n") and output.count("\n") == 1


def test_a_process_without_a_launcher_leaves_no_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(url: str, value: object) -> None:
        raise UnreachableError(f"{url}: failed after 6 attempts")

    monkeypatch.setattr(storage, "write_json", silent)
    with pytest.raises(UnreachableError, match=r"exits/dvae/attempt-0/rank-0\.json: failed after 6 attempts"):
        RunFolder(str(tmp_path)).record_exit("dvae", 0, 0, 1, "boom")


def test_a_launcher_of_one_process_records_its_own_end_once_the_storage_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outage(*arguments: object) -> None:
        raise UnreachableError("s3://b/x: failed after 6 attempts")

    real, failed = storage.write_json, list[str]()

    def once(url: str, value: object) -> None:
        if url.endswith("rank-0.json") and not failed:
            failed.append(url)
            outage()
        real(url, value)

    monkeypatch.setattr(storage, "write_json", once)
    monkeypatch.setattr("train.stages.tokenizer.run", outage)
    ended = attempt_module.execute("tokenizer", load_run("tiny", []), RunFolder(str(tmp_path)), Placement(1), StopFlag())
    assert failed and ended == (1, "rank 0: storage unreachable: s3://b/x: failed after 6 attempts")


def test_a_node_whose_node_0_does_not_come_says_so_and_hears_a_stop_signal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    job, stop = Job("7", 0, 1, 2, f"127.0.0.1:{free_port()}", "127.0.0.1"), StopFlag()
    monkeypatch.setattr(meeting, "RENDEZVOUS_S", 1.5)
    monkeypatch.setattr(meeting, "_SAY_S", 0.5)
    with pytest.raises(LostPeerError, match=rf"node 0 of job 7\.0 did not begin 'dvae' at {job.rendezvous} within 1\.5 s"):
        meeting.join(job, "dvae", stop, str)
    assert f"waiting for node 0 of 2 at {job.rendezvous} (1 s)" in caplog.text
    stop.handle(signal.SIGTERM, None)
    with pytest.raises(StopRequested, match="SIGTERM before node 0 had begun; nothing was begun here"):
        meeting.join(job, "dvae", stop, str)


def test_a_killed_rank_leaves_no_notes_of_pythons_tracker_on_the_terminal() -> None:
    code = "import os; from multiprocessing.shared_memory import SharedMemory as Segment; Segment(create=True, size=16); os._exit(0)"
    said = {
        quiet: subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONWARNINGS": quiet}, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        ).stderr
        for quiet in ("", TRACKER_NOTES)
    }
    assert "leaked shared_memory" in said[""] and said[TRACKER_NOTES] == ""
