"""Where launchers meet: ports that are taken, starts that are over, nodes that are missing, silent or of another family of addresses. About 10 s."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import agent, interfaces, ledger, meeting
from infra.errors import ExitCode, LostPeerError
from infra.job import Job
from infra.meeting import Meeting
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.patience import PATIENCE_S


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_SIGN_S": 0.1, "_LOOK_S": 0.5, "_SAY_S": 0.3, "SILENT_S": 1.0, "HEARD_S": 2.0}.items():
        monkeypatch.setattr(meeting, name, value)


def job(node: int, port: int, nodes: int = 2, host: str = "127.0.0.1", name: str = "7", restart: int = 0) -> Job:
    return Job(name, restart, node, nodes, interfaces.endpoint(host, port), host)


def joined(mine: Job, place: str = "") -> list[Meeting | BaseException]:
    """What becomes of a node in a thread: filled in once it is known."""
    found: list[Meeting | BaseException] = []

    def work() -> None:
        try:
            found.append(meeting.join(mine, "dvae", StopFlag(), lambda: place))
        except BaseException as error:
            found.append(error)

    threading.Thread(target=work, daemon=True).start()
    return found


def until(condition: object, what: str, limit_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@contextlib.contextmanager
def listening(port: int = 0) -> Iterator[int]:
    """A program of somebody else's."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        yield int(taken.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"], ids=["IPv4", "an IPv6 literal"])
def test_nodes_meet_and_hear_from_node_0_how_the_attempt_ended(host: str) -> None:
    port = free_port()
    first = meeting.host(job(0, port, host=host), lambda start, place: 3)
    other = joined(job(1, port, host=host))
    until(lambda: other, "node 1 came")
    (second,) = other
    assert isinstance(second, Meeting) and (second.attempt, second.start, second.place) == (3, first.start, first.place)
    assert first.place == (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    threading.Thread(target=first.tell, args=(93, "diverged"), daemon=True).start()
    assert second.hear(20) == (93, "diverged")
    for each in (first, second):
        each.close()


def test_a_port_in_use_is_named_and_the_next_one_is_in_the_attempts_record_where_the_others_find_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(str(tmp_path))
    with listening() as port:
        attempt, first = agent._begin_together(agent.Placement(1, job(0, port)), run, "dvae", StopFlag())
        assert first is not None and f"port {port} is in use on node 0 (127.0.0.1)" in caplog.text
        (newest,) = ledger.newest_first(run, "dvae")
        assert newest.rendezvous == first.place and interfaces.split(first.place)[1] in range(port + 1, port + meeting.PORTS)
        number, second = agent._begin_together(agent.Placement(1, job(1, port)), run, "dvae", StopFlag())
    assert second is not None and (number, second.start) == (attempt, first.start)
    for each in (first, second):
        each.close()


def test_where_no_port_is_free_all_that_were_tried_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PORTS", 1)
    with listening() as port, pytest.raises(LostPeerError, match=rf"node 0 of job 7\.0 finds no free port from {port} to {port}: free one"):
        meeting.host(job(0, port), lambda start, place: 0)


def test_a_name_that_is_not_node_0s_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, port: int, *, serves: bool) -> None:
        raise RuntimeError("The client socket has timed out")

    monkeypatch.setattr(meeting, "_store", fails)
    with pytest.raises(LostPeerError, match=r"node 0 of job 7\.0 cannot use 127\.0\.0\.1:1, .*is the name another node's\?"):
        meeting.host(job(0, 1), lambda start, place: 0)


def test_a_job_that_is_resumed_under_its_old_id_has_a_start_of_its_own_and_waits_for_the_old_ones_node_0(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    old = meeting.host(job(0, port), lambda start, place: 0)
    before = joined(job(1, port))
    until(lambda: before, "it came")
    late = joined(job(1, port))  # resumed, while the old node 0 still saves
    until(lambda: "is an earlier start of job 7, in which node 1 has a place already" in caplog.text, "the old start is told apart")
    assert not late
    new = meeting.host(job(0, free_port()), lambda start, place: 1)
    assert new.start != old.start
    for each in (old, new, *before):
        assert isinstance(each, Meeting)
        each.close()


def test_another_jobs_meeting_at_the_same_port_is_left_alone() -> None:
    port = free_port()
    alien = meeting.host(job(0, port, name="8"), lambda start, place: 0)
    mine = meeting.host(job(0, free_port()), lambda start, place: 4)
    found = joined(job(1, port), mine.place)  # as the record of the attempt says
    until(lambda: found, "it looked there")
    assert isinstance(found[0], Meeting) and found[0].attempt == 4 and alien.missing() == [1]
    for each in (alien, mine, found[0]):
        each.close()


def test_node_0_says_for_whom_it_waits_and_which_node_no_longer_answers(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    first = meeting.host(job(0, port, nodes=3), lambda start, place: 0)
    until(lambda: "waiting for node 1, 2 of 3" in caplog.text, "who is missing")
    found = joined(job(1, port, nodes=3))
    until(lambda: found, "node 1 came")
    until(lambda: first._signs.get(1), "its signs")
    assert first.missing() == [2] and first.silent() == ""
    assert isinstance(found[0], Meeting)
    found[0].close()  # as if its link went down
    until(first.silent, "it is noticed")
    assert first.silent().startswith("node 1 (127.0.0.1) has given no sign for ") and first.silent().endswith(": it is lost, or the link to it")
    assert found[0].hear(0.3) is None, "nothing was said"
    first.close()


def test_a_node_that_gave_no_sign_is_in_the_reason_of_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, port = RunFolder(str(tmp_path)), free_port()
    placement = agent.Placement(1, job(0, port))
    attempt, first = agent._begin_together(placement, run, "dvae", StopFlag())
    assert first is not None
    monkeypatch.setattr(first, "silent", lambda: "node 1 (n2) has given no sign for 95 s: it is lost, or the link to it")
    monkeypatch.setattr(agent, "_PEERS_S", 0)
    run.record_exit("dvae", attempt, 0, ExitCode.CRASH, "another rank is gone (timed out)")
    code, reason = agent._end_together(placement, run, "dvae", attempt, first, "")
    assert (code, reason.partition(";")[0]) == (1, "node 1 (n2) has given no sign for 95 s: it is lost, or the link to it")
    assert ledger.read(run, "dvae")[0].reason == reason, "and whoever looks later finds it"
    assert "rank 1 ended without a record" in reason and not (tmp_path / "exits/dvae/attempt-0/end.json").exists(), (
        "whoever is left may still say more"
    )


def test_gloo_is_given_the_interface_towards_node_0_where_the_hosts_name_is_the_loopbacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # empty is unset, and this is undone whatever the code puts there
    assert (
        interfaces.is_loopback("localhost") and interfaces.is_loopback("a-name-that-nobody-has.invalid") and not interfaces.is_loopback("192.0.2.1")
    )
    assert (
        interfaces.towards("127.0.0.1") == "lo" and interfaces.towards("::1") == "lo" and interfaces.towards("a-name-that-nobody-has.invalid") == ""
    )
    monkeypatch.setattr(interfaces, "is_loopback", lambda name: True)
    monkeypatch.setattr(interfaces, "towards", lambda host: f"eth-{host}")
    agent._choose_interface(job(1, 1, host="10.0.0.9"))
    assert agent.os.environ["GLOO_SOCKET_IFNAME"] == "eth-10.0.0.9" and "resolves to the loopback interface: gloo uses eth-10.0.0.9" in caplog.text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    agent._choose_interface(job(1, 1))
    assert agent.os.environ["GLOO_SOCKET_IFNAME"] == "ib0", "what a site says, counts"
