"""Storage over a network that fails: bodies that break off, throttling, answers that get lost. A scripted server on loopback; about 2 s."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra import s3, storage
from infra.errors import ConfigError, DataError, ExitCode, UnreachableError

URL = "s3://bucket/folder/object.bin"
CONTENT = b"0123456789" * 1000


class ScriptedServer(ThreadingHTTPServer):
    """Answers each request by the next function of ``script``, and by the last one ever after."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script: list[Callable[[_Handler], None]] = []
        self.requests: list[tuple[str, dict[str, str]]] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Broken connections are what these tests are about: no traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def _handle(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, {name.lower(): value for name, value in self.headers.items()}))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    do_GET = do_PUT = do_HEAD = do_POST = _handle

    def log_message(self, *args: object) -> None:
        """Silence."""

    def answer(self, status: int, body: bytes = b"", length: int | None = None, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None:
            self.close_connection = True


def whole(handler: _Handler) -> None:
    handler.answer(200, CONTENT, headers={"ETag": '"1"'})


def cut(handler: _Handler) -> None:
    """Half a body, then the connection closes."""
    handler.answer(200, CONTENT[:5000], length=len(CONTENT))


def drop(handler: _Handler) -> None:
    """No answer at all."""
    handler.close_connection = True


def error(status: int, code: str) -> Callable[[_Handler], None]:
    return lambda handler: handler.answer(status, f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A scripted S3 endpoint; nobody waits between attempts."""
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 3)
    monkeypatch.setattr(s3, "BACKOFF_S", 0.0)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    with ScriptedServer() as scripted:
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_EC2_METADATA_DISABLED": "true"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{scripted.server_address[1]}")
        thread = threading.Thread(target=scripted.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield scripted
        scripted.shutdown()
        thread.join()


@pytest.mark.parametrize("fault", [cut, drop, error(503, "SlowDown"), error(500, "InternalError")], ids=["cut", "drop", "slow-down", "internal"])
def test_a_read_that_fails_twice_succeeds_the_third_time(server: ScriptedServer, fault: Callable[[_Handler], None]) -> None:
    server.script = [fault, fault, whole]
    assert storage.read_bytes(URL) == CONTENT
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [(cut, "failed after 3 attempts"), (drop, "failed after 3 attempts"), (error(503, "SlowDown"), "answered SlowDown after at most 3 attempts")],
    ids=["cut", "drop", "slow-down"],
)
def test_a_read_that_always_fails_names_the_object_and_is_retried_by_schedulers(
    server: ScriptedServer, fault: Callable[[_Handler], None], words: str
) -> None:
    server.script = [fault]
    with pytest.raises(UnreachableError, match=rf"s3://bucket/folder/object\.bin: .*{words}") as caught:
        storage.read_bytes(URL)
    assert caught.value.exit_code == ExitCode.CRASH, "an outage says nothing about the data"
    assert len(server.requests) == 3


def test_a_body_with_a_wrong_checksum_is_read_again(server: ScriptedServer) -> None:
    checksum = {"x-amz-checksum-crc32": "AAAAAA=="}
    server.script = [lambda handler: handler.answer(200, CONTENT, headers=checksum), whole]
    assert storage.read_bytes(URL) == CONTENT
    assert len(server.requests) == 2


def ranged(size: int, etag: str = '"1"') -> Callable[[_Handler], None]:
    """Answers a range honestly, but sends at most ``size`` bytes of it before the connection closes."""

    def handle(handler: _Handler) -> None:
        asked = handler.headers.get("Range", "bytes=0-")
        start, _, end = asked.removeprefix("bytes=").partition("-")
        body = CONTENT[int(start) : int(end) + 1 if end else None]
        if handler.headers.get("If-Match", etag) != etag:
            handler.answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
        elif not body:
            handler.answer(416, b"<Error><Code>InvalidRange</Code></Error>")
        else:
            handler.answer(206 if int(start) else 200, body[:size], length=len(body), headers={"ETag": etag})

    return handle


def test_a_stream_that_breaks_off_goes_on_where_it_broke_however_often_it_gets_on(server: ScriptedServer) -> None:
    server.script = [ranged(3000), drop, ranged(100), error(503, "SlowDown"), ranged(5000), ranged(10_000)]
    with storage.open_stream(URL) as stream:
        assert stream.read() == CONTENT
    asked = [headers.get("range", "") for method, headers in server.requests]
    assert asked == ["", "bytes=3000-", "bytes=3000-", "bytes=3100-", "bytes=3100-", "bytes=8100-"]


def test_a_stream_that_gets_no_further_is_a_data_error_that_names_the_object_and_the_byte(server: ScriptedServer) -> None:
    server.script = [ranged(3000), ranged(0)]
    with (
        storage.open_stream(URL) as stream,
        pytest.raises(UnreachableError, match=r"object\.bin: failed after 3 attempts at byte 3000 .*check the network"),
    ):
        stream.read()


def test_a_stream_of_an_object_that_changes_meanwhile_is_refused(server: ScriptedServer) -> None:
    server.script = [ranged(3000), ranged(10_000, '"2"')]
    with storage.open_stream(URL) as stream, pytest.raises(DataError, match=r"object\.bin: has changed while it was being read"):
        stream.read()


def test_a_stream_with_a_wrong_checksum_is_refused_at_its_end(server: ScriptedServer) -> None:
    server.script = [lambda handler: handler.answer(200, CONTENT, headers={"x-amz-checksum-crc32": "AAAAAA=="})]
    with storage.open_stream(URL) as stream, pytest.raises(DataError, match=r"object\.bin: damaged on its way"):
        stream.read()


def test_a_stream_may_begin_at_the_end(server: ScriptedServer) -> None:
    server.script = [ranged(10_000)]
    with storage.open_stream(URL, len(CONTENT)) as stream:
        assert stream.read() == b""


def test_a_range_that_breaks_off_is_read_again(server: ScriptedServer) -> None:
    server.script = [whole, ranged(10), ranged(10_000)]  # the first answers HEAD
    with storage.open_seekable(URL) as file:
        file.seek(100)
        assert file.read(50) == CONTENT[100:150]


def test_a_download_that_breaks_off_is_repeated_and_leaves_no_pieces(server: ScriptedServer, tmp_path: Path) -> None:
    server.script = [whole, cut, cut, whole]  # the first answers HEAD
    storage.download_file(URL, tmp_path / "copy", hashlib.sha256(CONTENT).hexdigest())
    assert (tmp_path / "copy").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_download_that_never_completes_leaves_nothing(server: ScriptedServer, tmp_path: Path) -> None:
    server.script = [whole, cut]
    with pytest.raises(DataError, match=r"object\.bin: (failed|the server)"):
        storage.download_file(URL, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_meets_throttling_is_repeated_whole(server: ScriptedServer) -> None:
    received: list[bytes] = []

    def take(handler: _Handler) -> None:
        received.append(handler.body)
        handler.answer(200)

    server.script = [error(503, "SlowDown"), drop, take]
    storage.write_bytes(URL, CONTENT)
    assert len(server.requests) == 3
    assert CONTENT in received[0]


def test_a_creator_whose_first_answer_was_lost_knows_its_own_object(server: ScriptedServer) -> None:
    def own_metadata(handler: _Handler) -> None:
        writer = next(headers["x-amz-meta-writer"] for method, headers in server.requests if method == "PUT")
        handler.answer(200, headers={"x-amz-meta-writer": writer})

    server.script = [drop, error(412, "PreconditionFailed"), own_metadata]
    assert storage.create_once(URL, b"mine")
    server.script = [error(412, "PreconditionFailed"), lambda handler: handler.answer(200, headers={"x-amz-meta-writer": "rival"})]
    assert not storage.create_once(URL, b"mine")


def test_a_creator_that_meets_a_rival_in_the_act_asks_again_but_not_for_ever(server: ScriptedServer) -> None:
    server.script = [error(409, "ConditionalRequestConflict"), lambda handler: handler.answer(200)]
    assert storage.create_once(URL, b"mine")
    server.script = [error(409, "ConditionalRequestConflict")]
    with pytest.raises(DataError, match="answered ConditionalRequestConflict"):
        storage.create_once(URL, b"mine")


def test_objects_that_may_not_be_deleted_are_named(server: ScriptedServer) -> None:
    listing = b"<ListBucketResult><Contents><Key>folder/a</Key></Contents></ListBucketResult>"
    refusal = b"<DeleteResult><Error><Key>folder/a</Key><Code>AccessDenied</Code></Error></DeleteResult>"
    server.script = [lambda handler: handler.answer(200, listing), lambda handler: handler.answer(200, refusal)]
    with pytest.raises(ConfigError, match=r"s3://bucket/folder/a: cannot be deleted \(AccessDenied\); this key needs s3:DeleteObject"):
        storage.delete_prefix("s3://bucket/folder")


def test_a_server_that_is_not_there_is_named(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UnreachableError, match=r"object\.bin: failed after 3 attempts .*127\.0\.0\.1:1.*check the network and S3_ENDPOINT_URL"):
        storage.read_bytes(URL)
