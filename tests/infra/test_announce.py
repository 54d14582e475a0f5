"""Progress in SLURM's comment and in a TrainJob's status: rate-limited, off where neither is here, never failing a run, and the token in no log. A few seconds."""

from __future__ import annotations

import http.server
import json
import logging
import os
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from infra import announce, listening, live
from infra.job import Job
from infra.run_folder import RunFolder

TOKEN = "planted-token-0123456789"
FACTS: dict[str, Any] = {"label": "dvae", "done": 120, "total": 1500, "rate": 8.1, "loss": 0.41234, "eta_s": 171.0, "phase": ""}


class Recorder(http.server.BaseHTTPRequestHandler):
    """Keeps what it gets, and answers as told."""

    seen: list[dict[str, Any]]
    answers: list[int]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append({"path": self.path, "authorization": self.headers["Authorization"], "body": body})
        code = self.answers.pop(0) if self.answers else 200
        self.send_response(code)
        if code == 302:
            self.send_header("Location", f"https://localhost:{self.server.server_address[1]}/elsewhere")  # type: ignore[index]
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST  # what a redirect would become

    def log_message(self, *_: Any) -> None: ...


def certificate(folder: Path) -> Path:
    """A certificate of localhost and its key, in one file."""
    words = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    done = subprocess.run([*words.split(), "-keyout", folder / "key.pem", "-out", folder / "ca.pem"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no openssl that makes a certificate: {done.stderr.decode()[-200:]}")
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "ca.pem").read_text())
    return folder / "both.pem"


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    handler = type("Handler", (Recorder,), {"seen": [], "answers": []})
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(tmp_path))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    port = server.server_address[1]
    for name, value in {
        "URL": f"https://localhost:{port}/trainjobs/mine/status",
        "TOKEN": f"{tmp_path}/token",
        "CA_CERT": f"{tmp_path}/ca.pem",
    }.items():
        monkeypatch.setenv(f"KUBEFLOW_TRAINER_STATUS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "localhost")
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


def test_a_trainjob_is_told_by_one_post_with_its_token(trainer: type[Recorder]) -> None:
    announcer = announce.announcer(Job())
    assert announcer is not None
    announcer(FACTS)
    announcer(FACTS | {"done": 121})  # a moment later: not yet
    announcer(FACTS | {"done": 1500, "eta_s": None, "ended": True})
    first, last = trainer.seen
    assert (first["path"], first["authorization"]) == ("/trainjobs/mine/status", f"Bearer {TOKEN}")
    told = first["body"]["trainerStatus"]
    assert (told["progressPercentage"], told["estimatedRemainingSeconds"]) == (8, 171) and told["lastUpdatedTime"].endswith("+00:00")
    assert told["metrics"] == [{"name": "step", "value": "120"}, {"name": "loss", "value": "0.41234"}, {"name": "stage", "value": "dvae"}]
    assert last["body"]["trainerStatus"]["progressPercentage"] == 100 and "estimatedRemainingSeconds" not in last["body"]["trainerStatus"]


@pytest.mark.parametrize("fault", ["refused", "redirected", "plain http", "no token", "not trusted", "gone"])
def test_what_fails_there_is_said_once_without_the_token_and_ends_nothing(
    fault: str, trainer: type[Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer.answers[:] = {"refused": [401] * 9, "redirected": [302] * 9}.get(fault, [])
    url = os.environ["KUBEFLOW_TRAINER_STATUS_URL"]
    changes = {"plain http": ("URL", url.replace("https", "http")), "no token": ("TOKEN", TOKEN), "gone": ("URL", "https://localhost:1/x")}
    if fault in changes:
        monkeypatch.setenv(f"KUBEFLOW_TRAINER_STATUS_{changes[fault][0]}", changes[fault][1])
    if fault == "not trusted":
        monkeypatch.delenv("KUBEFLOW_TRAINER_STATUS_CA_CERT")
    monkeypatch.setenv("LAUNCHER_ANNOUNCE_S", "0.000001")
    announcer = announce.announcer(Job())
    assert announcer is not None
    with caplog.at_level(logging.DEBUG):
        for _ in range(9):
            announcer(FACTS)
    words = {
        "refused": "HTTP 401",
        "redirected": "HTTP 302",
        "plain http": "is not https://",
        "no token": "KUBEFLOW_TRAINER_STATUS_TOKEN names no file",
        "not trusted": "certificate verify failed",
        "gone": "Connection refused",
    }
    assert caplog.text.count("the TrainJob's status does not show this run") == 1 and words[fault] in caplog.text
    assert TOKEN not in caplog.text and not any(call["path"] == "/elsewhere" for call in trainer.seen)
    assert len(trainer.seen) == (announce._FAILURES if fault in ("refused", "redirected") else 0), (
        "nothing more is tried after some failures in a row"
    )


def test_it_is_off_where_nobody_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEFLOW_TRAINER_STATUS_URL", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert announce.announcer(Job()) is None and announce.announcer(Job("77")) is None
    monkeypatch.setenv("KUBEFLOW_TRAINER_STATUS_URL", "https://x")
    assert announce.announcer(Job("uid", node=1, nodes=2, rendezvous="a:1")) is not None, "rank 0 may be on any node: elastic orders them by address"


def test_the_node_of_rank_0_tells_for_all_whatever_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_LIVE_S", "0.05")
    heard: dict[int, list[dict[str, Any]]] = {0: [], 1: []}
    for node, rank in ((0, 1), (1, 0)):
        with listening.listening(str(tmp_path), "dvae", 0, Job("uid", node=node, nodes=2, rendezvous="a:1"), heard[node].append):
            live.begin(rank)
            live.end()
    assert [len(facts) > 0 for facts in heard.values()] == [False, True]


Scontrol = Callable[[], list[str]]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    script = f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\n[ ! -e {tmp_path}/down ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}\n'
    script += f'[ "$1" != show ] || {{ echo "JobId=77 JobName=x"; cat {tmp_path}/comment 2> /dev/null; }}; exit 0\n'
    (tmp_path / "scontrol").write_text(script)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    return lambda: (tmp_path / "calls").read_text().splitlines()


def test_slurm_s_comment_says_step_loss_and_time_to_go_now_and_then(scontrol: Scontrol) -> None:
    announcer = announce.announcer(Job("77"))
    assert announcer is not None
    announcer(FACTS | {"total": 0})  # nothing to say yet
    for done in (120, 121, 122):
        announcer(FACTS | {"done": done})
    announcer(FACTS | {"phase": "a save", "ended": True})
    assert scontrol() == [
        "show job 77",
        "update JobId=77 Comment=dvae 120/1500 8.1/s loss 0.4123 ETA 2:51",
        "update JobId=77 Comment=dvae 120/1500 ended loss 0.4123 (a save)",
    ]


def test_a_comment_that_somebody_set_stays_and_one_of_an_earlier_start_does_not(
    scontrol: Scontrol, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "comment").write_text("   Comment=billed to project 7\n")
    theirs = announce.announcer(Job("77"))
    assert theirs is not None
    theirs(FACTS)
    assert scontrol() == ["show job 77"] and "has a comment already, which stays: billed to project 7" in caplog.text
    (tmp_path / "comment").write_text("   Comment=dvae 90/1500 loss 1\n")
    ours = announce.announcer(Job("77"))
    assert ours is not None
    ours(FACTS)
    assert scontrol()[-1].startswith("update JobId=77 Comment=dvae 120/1500")


def test_a_controller_that_does_not_answer_ends_nothing(scontrol: Scontrol, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "down").touch()
    announcer = announce.announcer(Job("77"))
    assert announcer is not None
    announcer(FACTS)
    assert "SLURM's comment does not show this run: RuntimeError: scontrol show job ended with 1: Unable to contact" in caplog.text


def test_a_launcher_passes_on_what_rank_0_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_LIVE_S", "0.05")
    heard: list[dict[str, Any]] = []
    run = RunFolder(str(tmp_path))
    with listening.listening(run.url, "dvae", 0, Job(), heard.append):
        live.begin(0)
        live.say(now=True, title="dvae", done=3, total=9, loss=float("nan"))
    live.end()
    assert (heard[-1]["label"], heard[-1]["done"], heard[-1]["loss"], heard[-1]["ended"]) == ("dvae", 3, None, True)
