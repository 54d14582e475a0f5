"""A rank whose peer has ended says nothing where the peer said why."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra import lost_peer
from infra.errors import ExitCode
from infra.run_folder import RunFolder


@pytest.mark.parametrize(
    "text",
    [
        "[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:3250. GLHF!",
        "NCCL error: remote process exited or there was a network error",
    ],
)
def test_what_collectives_raise_without_their_peer_is_known(text: str) -> None:
    assert lost_peer.is_lost_peer(RuntimeError(text))


@pytest.mark.parametrize("text", ["no kernel of gloo for this dtype", "shape '[2]' is invalid"])
def test_other_errors_of_torch_are_no_lost_peer(text: str) -> None:
    assert not lost_peer.is_lost_peer(RuntimeError(text)) and not lost_peer.is_lost_peer(OSError("Connection reset by peer"))


def test_the_peers_reason_is_found_and_a_killed_peer_has_none(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    attempt = run.begin_attempt("prepare")
    assert lost_peer.why_peer_ended(run, "prepare", attempt, 1, wait_s=0.1) == ""
    run.record_exit("prepare", attempt, 1, ExitCode.CRASH, "its own record is no peer's")
    assert lost_peer.why_peer_ended(run, "prepare", attempt, 1, wait_s=0.1) == ""
    run.record_exit("prepare", attempt, 0, ExitCode.DATA, "no record in the train split")
    assert lost_peer.why_peer_ended(run, "prepare", attempt, 1, wait_s=0.1) == "rank 0: no record in the train split"
