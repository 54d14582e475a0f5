"""Storage over a network that fails: bodies that break off, throttling, answers that get lost. A scripted server on loopback; about 2 s."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.audit.check_parts import PartJob, Rules, check_part
from data_pipeline.audit.check_set import read_layout
from infra import node_checks, s3, storage
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

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

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
    with storage.open_stream(URL) as stream, pytest.raises(DataError, match=r"object\.bin: damaged in transit"):
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
    server.script = [cut]
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


def deletions(handler: _Handler) -> None:
    """As servers that want Content-MD5 delete."""
    sent = base64.b64encode(hashlib.md5(handler.body).digest()).decode()
    if handler.headers.get("Content-MD5") != sent:
        error(400, "MissingContentMD5")(handler)
    else:
        handler.answer(200, b"<DeleteResult></DeleteResult>")


def test_a_deletion_of_many_says_its_md5(server: ScriptedServer) -> None:
    listing = b"<ListBucketResult><Contents><Key>folder/a</Key></Contents></ListBucketResult>"
    server.script = [lambda handler: handler.answer(200, listing), deletions]
    storage.delete_prefix("s3://bucket/folder")
    assert server.requests[-1][0] == "POST"


def test_a_server_without_conditions_is_refused_or_declared(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [error(501, "NotImplemented")]
    with pytest.raises(ConfigError, match=r"does not create objects on condition \(If-None-Match: NotImplemented\), .*set cluster.kept_apart=true"):
        storage.create_once(URL, b"mine")
    assert [method for method, _ in server.requests] == ["PUT"], "nothing is looked up and then written in silence"
    monkeypatch.setenv("LAUNCHER_KEPT_APART", "1")
    server.script = [error(404, "NoSuchKey"), lambda handler: handler.answer(200)]
    assert storage.create_once(URL, b"mine") and "if-none-match" not in server.requests[-1][1]
    server.script = [lambda handler: handler.answer(200)]
    assert not storage.create_once(URL, b"mine")


def test_a_server_that_passes_over_the_condition_is_found_out(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.script = [lambda handler: handler.answer(200, CONTENT if handler.command == "GET" else b"")]  # whatever is asked, it is done
    with pytest.raises(ConfigError, match=r"ignores the condition to create an object only once \(If-None-Match\), so a launcher cannot"):
        s3.check_creation(URL)
    (lack,) = node_checks._creates_once("s3://bucket/run")
    assert not lack.ok and "If-None-Match" in lack.found and "kept_apart" in lack.advice
    monkeypatch.setenv("LAUNCHER_KEPT_APART", "1")
    s3.check_creation(URL)
    assert node_checks._creates_once("s3://bucket/run")[0].found == "declared (cluster.kept_apart)"


def test_certificates_and_proxies_are_configuration(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("S3_ENDPOINT_URL", f"https://{endpoint}")  # which speaks no TLS
    with pytest.raises(ConfigError, match=r"no trusted connection .*set AWS_CA_BUNDLE to the file of the certificates"):
        storage.read_bytes(URL)
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/file.pem")
    with pytest.raises(ConfigError, match=r"AWS_CA_BUNDLE = /no/such/file\.pem: there is no such file"):
        storage.read_bytes(URL)
    monkeypatch.delenv("AWS_CA_BUNDLE")
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://endpoint.invalid")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"the proxy does not answer .*HTTPS_PROXY and HTTP_PROXY, or name the endpoint's host in NO_PROXY"):
        storage.read_bytes(URL)


@pytest.mark.parametrize(
    ("sign", "kind"), [("certificate verify failed: CERTIFICATE_VERIFY_FAILED", ConfigError), ("EOF occurred", UnreachableError)]
)
def test_a_connection_that_breaks_as_it_is_made_is_no_configuration(sign: str, kind: type[Exception]) -> None:
    from botocore.exceptions import SSLError

    with pytest.raises(kind, match="AWS_CA_BUNDLE" if kind is ConfigError else "check the network"), s3._errors(URL):
        raise SSLError(endpoint_url="https://x", error=sign)


def silent(handler: _Handler) -> None:
    """Half a body, and then nothing for as long as anybody listens."""
    handler.answer(200, CONTENT[:5000], length=len(CONTENT) + 1)
    handler.wfile.flush()
    time.sleep(3)


def mute(handler: _Handler) -> None:
    time.sleep(3)
    handler.close_connection = True


@pytest.mark.parametrize("fault", [silent, mute])
def test_silence_ends_within_a_time_that_can_be_set(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, fault: Callable[[_Handler], None]
) -> None:
    monkeypatch.setenv("LAUNCHER_S3_SILENCE_S", "0.2")
    server.script = [fault]
    s3._client()  # which takes a while to make
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"object\.bin: failed after 3 attempts"):
        storage.read_bytes(URL)
    assert time.monotonic() - began < 2.5 and len(server.requests) <= 6, "attempts of requests and of bodies do not multiply"


def test_a_network_that_corrupts_every_answer_ends(server: ScriptedServer) -> None:
    server.script = [lambda handler: handler.answer(200, CONTENT, headers={"x-amz-checksum-crc32": "AAAAAA=="})]
    with pytest.raises(DataError, match=r"failed after 3 attempts .*the object is damaged, or the network is"):
        storage.read_bytes(URL)
    server.script = [lambda handler: handler.answer(200, b"<ListBuck\x00\xff")]
    with pytest.raises(UnreachableError, match=r"after (at most )?3 attempts"):
        storage.list_files("s3://bucket/folder")


def test_validation_stops_at_a_storage_that_gives_no_answer(server: ScriptedServer) -> None:
    server.script = [error(503, "SlowDown")]
    files = [{"name": name, "bytes": 1, "sha256": "0"} for name in ("a", "b", "c")]
    with pytest.raises(UnreachableError, match=r"done\.json: the server answered SlowDown"):
        check_part(PartJob("s3://bucket/set", {"name": "part-0", "count": 1, "files": files}, (), Rules("image/1", {}), "s3://bucket/set/versions/0"))
    assert len(server.requests) == 3, "not file by file"
    with pytest.raises(UnreachableError):
        read_layout("s3://bucket/set")
