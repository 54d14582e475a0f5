"""S3 for weeks: credentials that are renewed and rotated, uploads that nobody finished. A real server; about 10 s."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from infra import s3, s3_client, storage
from infra.errors import ConfigError, ExitCode, UnreachableError
from tests.support.s3_server import ACCESS_KEY, READ_ONLY, SECRET_KEY

FULL = (ACCESS_KEY, SECRET_KEY)
READER = (READ_ONLY["AWS_ACCESS_KEY_ID"], READ_ONLY["AWS_SECRET_ACCESS_KEY"])


def credentials(key: tuple[str, str]) -> str:
    return f"[default]\naws_access_key_id = {key[0]}\naws_secret_access_key = {key[1]}\n"


@pytest.fixture
def no_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix, and an environment without keys."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return s3


def exchange(link: Path, target: Path, text: str) -> None:
    """As a mounted secret changes: the link is exchanged, the file is another."""
    target.write_text(text)
    fresh = link.with_name("fresh")
    fresh.symlink_to(target)
    fresh.replace(link)


def test_a_credentials_file_that_is_exchanged_is_read_again(no_keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(link))
    with pytest.raises(ConfigError, match="no usable credentials"):
        storage.write_text(f"{no_keys}/a", "none yet")
    exchange(link, tmp_path / "1", credentials(READER))
    with pytest.raises(ConfigError, match="AccessDenied"):
        storage.write_text(f"{no_keys}/a", "by a reader")
    exchange(link, tmp_path / "2", credentials(FULL))
    storage.write_text(f"{no_keys}/a", "by a writer")
    (tmp_path / "2").write_text("[default]\naws_access_key_id = half")  # being written: the old keys go on
    storage.write_text(f"{no_keys}/a", "meanwhile")
    (tmp_path / "2").write_text("")
    storage.write_text(f"{no_keys}/a", "still")
    exchange(link, tmp_path / "3", credentials(READER))
    with pytest.raises(ConfigError, match="AccessDenied"):
        storage.write_text(f"{no_keys}/a", "the old keys are not used for ever")
    assert storage.read_text(f"{no_keys}/a") == "still"
    assert len({id(client) for _, client in s3_client._clients.values()}) == len(s3_client._clients) < 100, "a rotation replaces the client"


def test_a_process_that_gives_credentials_is_asked_again_before_they_expire(no_keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer is a reader's and about to expire, the next a writer's: a long-lived client gets on."""
    program = (
        "import json, pathlib, sys\n"
        f"asked = pathlib.Path({str(tmp_path / 'asked')!r})\n"
        "count = len(asked.read_text()) if asked.exists() else 0\n"
        "asked.write_text('x' * (count + 1))\n"
        f"key, expires = [({READER!r}, sys.argv[1]), ({FULL!r}, sys.argv[2])][min(count, 1)]\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': key[0], 'SecretAccessKey': key[1], 'Expiration': expires}))\n"
    )
    (tmp_path / "give.py").write_text(program)
    soon, later = (datetime.now(UTC) + timedelta(seconds=seconds) for seconds in (300, 7200))
    (tmp_path / "config").write_text(
        f"[default]\ncredential_process = {sys.executable} {tmp_path / 'give.py'} {soon:%Y-%m-%dT%H:%M:%SZ} {later:%Y-%m-%dT%H:%M:%SZ}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    client = s3_client.client(s3.MAX_ATTEMPTS, s3.READ_TIMEOUT_S)
    storage.write_text(f"{no_keys}/a", "by a writer")
    assert storage.read_text(f"{no_keys}/a") == "by a writer"
    assert s3_client.client(s3.MAX_ATTEMPTS, s3.READ_TIMEOUT_S) is client and len((tmp_path / "asked").read_text()) == 2


@contextmanager
def token_service(answers: list[tuple[tuple[str, str], float]], tokens: list[str]) -> Iterator[str]:
    """AssumeRoleWithWebIdentity, as far as a client sees it. Answers are keys and seconds until they expire; the last one stays."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            tokens.append(body.split("WebIdentityToken=")[1].split("&")[0])
            (key, secret), seconds = answers.pop(0) if len(answers) > 1 else answers[0]
            expires = datetime.now(UTC) + timedelta(seconds=seconds)
            text = (
                '<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>'
                f"<AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken></SessionToken>"
                f"<Expiration>{expires:%Y-%m-%dT%H:%M:%SZ}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>"
                "</AssumeRoleWithWebIdentityResponse>"
            ).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: object) -> None:
            """Silence."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_web_identity_is_renewed_with_the_token_that_is_mounted_then(no_keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, seen = tmp_path / "token", list[str]()
    token.write_text("first")
    with token_service([(READER, 300.0), (FULL, 7200.0)], seen) as endpoint:
        for name, value in {
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
            "AWS_ROLE_ARN": "arn:aws:iam::1:role/trainer",
            "AWS_ENDPOINT_URL_STS": endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        storage.list_files(no_keys)
        token.write_text("second")
        storage.write_text(f"{no_keys}/a", "by a writer")
    assert seen[0] == "first" and seen[-1] == "second", seen


def test_expired_credentials_are_retried_by_schedulers_and_say_what_is_renewed() -> None:
    with pytest.raises(UnreachableError) as caught, s3._errors("s3://bucket/x"):
        raise ClientError({"Error": {"Code": "ExpiredToken"}, "ResponseMetadata": {"HTTPStatusCode": 400}}, "GetObject")  # type: ignore[typeddict-item]
    found = caught.value
    assert found.exit_code == ExitCode.CRASH
    assert "the credentials have expired (ExpiredToken); use what is renewed" in str(found)


def begin_upload(url: str, parts: int = 1) -> Any:
    bucket, key = s3.bucket_and_key(url)
    client = boto3.client("s3", endpoint_url=os.environ["S3_ENDPOINT_URL"], region_name="us-east-1")
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    for number in range(parts):
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=number + 1, Body=b"x" * 1000)
    return upload


def test_unfinished_uploads_are_found_below_a_prefix_only_and_aborted(s3: str) -> None:
    from infra import s3 as objects

    for name in ("run/a/shard", "run/b", "run-2/c"):
        begin_upload(f"{s3}/{name}")
    storage.write_text(f"{s3}/run/whole", "an object is no upload")
    found = objects.unfinished_uploads(f"{s3}/run")
    assert sorted(upload.url for upload in found) == [f"{s3}/run/a/shard", f"{s3}/run/b"]
    assert all(abs(upload.begun - time.time()) < 60 for upload in found)
    objects.abort(found[0])
    objects.abort(found[0])  # again is no error
    assert [upload.url for upload in objects.unfinished_uploads(f"{s3}/run")] == [found[1].url]
    assert len(objects.unfinished_uploads(s3)) == 2 and storage.list_files(s3) == ["run/whole"]
    assert json.dumps([upload.upload_id for upload in found])
