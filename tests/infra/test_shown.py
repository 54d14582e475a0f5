"""What messages show and what is stored: no password, no control character, no value of thousands of characters; JSON that is read back is strict."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infra import files, logs, s3_client, shown, storage, strict_json
from infra.config import differences
from infra.errors import ConfigError, DataError, MissingError, ReportedError
from infra.run_folder import RunFolder
from train.config import load_run
from train.weights import export

PASSWORDS = [
    ("s3://AKIA123:abc/def+ghi=@bucket/runs", "s3://***@bucket/runs"),
    ("http://user:hunter22@host:9000", "http://***@host:9000"),
    ("https://hunter22@host/x", "https://***@host/x"),
    ("http://user:12345@host", "http://***@host"),
    ("s3://KEY:90/SECRETSECRET@bucket/x", "s3://***@bucket/x"),
    ("https://h/x?access_token=hunter22&x=1", "https://h/x?access_token=***&x=1"),
    ("https://h/x?a=1&api_key=hunter22&x=1", "https://h/x?a=1&api_key=***&x=1"),
    ("https://b.s3.amazonaws.com/k?X-Amz-Signature=hunter22&x=1", "https://b.s3.amazonaws.com/k?X-Amz-Signature=***&x=1"),
]
SECRET = "hunter22"
ODD = [
    f"s3://KEY:x'{SECRET}@bucket/x",
    f's3://KEY:x"{SECRET}@bucket/x',
    f"s3://KEY:x<{SECRET}@bucket/x",
    f"s3://KEY:x {SECRET}@bucket/x",
    f"s3://KEY%3A{SECRET}%40bucket/x",
    f"s3://KEY%253A{SECRET}%2540bucket/x",
    f"s3:/KEY:{SECRET}@bucket/x",
    f"s3:\\\\KEY:{SECRET}@bucket/x",
    f"S3://KEY:{SECRET}@bucket",
    f"az://c/x?sv=2&sig%3D{SECRET}",
    f"ftp://u:{SECRET}@h",
    f"http:/u:{SECRET}@127.0.0.1:1",
    f"https://u:90'{SECRET}@h",
]
"""Forms of a URL with a password that people mistype, or whose password has the characters of another syntax."""
BARE = [f"u:{SECRET}@127.0.0.1:1", f"KEY:{SECRET}@bucket", f"KEY%3A{SECRET}%40bucket/x", f"KEY:a'{SECRET}@bucket"]
"""The same without a scheme."""
HARMLESS = [
    "s3://bucket/a@b",
    "http://host:9000/a@b",
    "http://[::1]:9000/a@b",
    "runs/user@host",
    "file:///data/a:b@c",
    "registry.example/launcher@sha256:0a",
    "s3://bucket/a?b=c",
    "registry.example:5000/launcher:v1@sha256:0a",
    "launcher:v1@sha256:0a",
    "localhost:9000/a@b",
    "a note: write to us @ home",
    "'s3://bucket': no such place; by user@host, at 12:30:11",
    "s3://bucket/100%25/a@b",
    "data/cat:1@2x.png",
    "'http://host:9000' does not answer; ask user@host",
]


@pytest.mark.parametrize(("given", "masked"), PASSWORDS)
def test_a_password_in_a_url_is_masked_in_messages_and_logs(given: str, masked: str) -> None:
    assert str(DataError(f"{given}: does not exist.")) == f"{masked}: does not exist."
    record = logging.LogRecord("infra", logging.INFO, "", 0, "reading %s", (given,), None)
    assert logs._Lines(io.StringIO()).format(record) == f"reading {masked}"


@pytest.mark.parametrize("given", HARMLESS)
def test_a_url_without_a_password_is_shown_as_it_is(given: str) -> None:
    assert shown.message(given) == given and not shown.holds_password(given) and not shown.place_holds_password(given)


@pytest.mark.parametrize("given", [*ODD, *BARE])
def test_whatever_form_a_password_has_it_is_masked_and_its_place_is_refused_by_name(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for message in (f"{given}: does not exist.", f"'{given}' and more", f"--out {given}"):
        assert SECRET not in shown.message(message), message
    found = []
    for words in ([f"data.images={given}"], [f"data.sources={given}"], [f"run.root={given}"]):
        with pytest.raises(ConfigError, match=r"(data|run)\.") as caught:
            load_run("tiny", words)
        found.append(str(caught.value))
    monkeypatch.setenv("S3_ENDPOINT_URL", given)
    with pytest.raises(ConfigError, match=r"^S3_ENDPOINT_URL: ") as caught:
        s3_client.client(1, 1.0)
    found.append(str(caught.value))
    if given in ODD:
        with pytest.raises(ConfigError) as caught:
            storage.exists(given)
        found.append(str(caught.value))
    for message in found:
        head, refused, _ = message.partition(shown.NO_PASSWORDS)
        assert refused and not any(part in head for part in (SECRET, "KEY", "bucket")), message


@pytest.mark.parametrize("given", ["https://user:passw0rd'x@host", 'https://user:pass"w0rd@host:9000', "https://user:pass<word@host/x"])
def test_a_url_whose_password_has_odd_characters_is_refused(given: str) -> None:
    assert shown.holds_password(given)


@pytest.mark.parametrize("key", ["run.root", "data.images", "data.takedown", "data.sources"])
def test_a_password_in_a_configuration_is_refused_before_anything_is_stored(key: str) -> None:
    value = '["s3://AKIA:hunter22@bucket/x"]' if key == "data.sources" else "s3://AKIA:hunter22@bucket/x"
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}.*: a URL may not carry a user, a password or a signature") as caught:
        load_run("tiny", [f"{key}={value}"])
    assert key in str(caught.value) and "hunter22" not in str(caught.value)


@pytest.mark.parametrize("name", ["S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "STORAGE_EMULATOR_HOST"])
def test_a_password_in_an_endpoint_is_refused_where_a_run_is_configured_and_where_a_client_is_made(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "http://user:hunter22@host:9000")
    for action in (lambda: load_run("tiny", []), lambda: s3_client.client(1, 1.0)):
        with pytest.raises(ConfigError, match=rf"^{name}: a URL may not carry") as caught:
            action()
        assert "hunter22" not in str(caught.value)


def test_storage_refuses_a_url_with_a_password() -> None:
    with pytest.raises(ConfigError, match=r"^s3://\*\*\*: a URL may not carry"):
        storage.exists("s3://AKIA:hunter22@bucket/x")


def test_what_the_environment_holds_as_a_secret_is_in_no_message_and_in_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22hunter22")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    assert str(ReportedError("refused hunter22hunter22 of /var/run/token")) == "refused *** of /var/run/token"
    run = RunFolder(str(tmp_path))
    run.record_exit("dvae", 0, 0, 1, "KeyError: 'hunter22hunter22'")
    assert "hunter22" not in (tmp_path / "exits/dvae/attempt-0/rank-0.json").read_text()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PGPASSWORD", "hunter22hunter22", "hunter22hunter22"),
        ("MYSQL_PWD", "hunter22hunter22", "hunter22hunter22"),
        ("SSH_PASSPHRASE", "hunter22hunter22", "hunter22hunter22"),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=hunter22hunter22==;X=y", "AccountName=me;AccountKey=hunter22hunter22==;X=y"),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountName=me;AccountKey=hunter22hunter22==;X=y", "the key hunter22hunter22== is odd"),
        ("AZURE_STORAGE_CONNECTION_STRING", "SharedAccessSignature=sv=1&sig=hunter22", "sv=1&sig=hunter22"),
    ],
)
def test_secrets_of_other_stores_and_programs_are_masked_too(name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert "hunter22" not in str(ReportedError(f"refused: {said}."))
    for path in ("PWD", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(path, "/some/place/of/mine")
    assert str(ReportedError("/some/place/of/mine is missing")) == "/some/place/of/mine is missing"


def test_a_name_with_a_null_character_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no name of a file, for it holds a null character"):
        storage.read_bytes(f"{tmp_path}/a\0b")


def test_messages_hold_no_control_characters_and_cut_values() -> None:
    assert str(DataError("a\x1b[2J\u202eb\r\ud800\nc\td")) == "a\\x1b[2J\\u202eb\\r\\ud800\nc\td"
    message = str(DataError(f"s3://bucket/{'x' * 5000}: does not exist."))
    assert len(message) < 500 and "(5,013 characters)" in message and message.endswith(": does not exist.")
    assert len(str(DataError("word " * 100_000))) <= shown.LONGEST_MESSAGE


def test_an_error_keeps_its_message_through_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(DataError("a\x1b")))
    assert type(error) is DataError and str(error) == "a\\x1b"


def test_a_value_of_5000_characters_is_cut_in_complaints_and_differences() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("tiny", [f"dalle.layers={'y ' * 2500}"])
    assert len(str(caught.value)) < 1000
    (line,) = differences({"a": "z " * 2500}, {"a": ""})
    assert len(line) < 500 and line.endswith("-> ''")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000 + "]" * 5000, "more than 64 deep"),
        ("[" * 100 + "]" * 100, "more than 64 deep"),
        ('{"a": 1, "a": 2}', "key 'a' occurs twice"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ("-Infinity", "-Infinity is not a JSON number"),
        ("1e999", "is not finite"),
        ("9" * 5000, "an integer of 5000 digits"),
        ('{"a":', "Expecting value"),
    ],
)
def test_json_that_no_writer_of_ours_makes_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="not valid JSON") as caught:
        storage.read_json(str(tmp_path / "a.json"))
    assert words in str(caught.value)


def test_a_file_that_is_too_large_or_no_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_BYTES", 100)
    (tmp_path / "a.json").write_text(json.dumps("x" * 99))
    with pytest.raises(DataError, match="larger than 100 bytes"):
        storage.read_json(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match="not a regular file"):
        storage.read_json("/dev/zero")


@pytest.mark.parametrize(
    "read",
    [
        storage.read_bytes,
        storage.read_text,
        lambda url: storage.read_range(url, 0, 8),
        lambda url: storage.download_file(url, Path(f"{url}-copy")),
        lambda url: export.read_tensors(url.rpartition("/")[0]),
    ],
    ids=["read_bytes", "read_text", "read_range", "download_file", "weights"],
)
def test_a_pipe_in_a_file_s_place_is_refused_and_not_waited_for(tmp_path: Path, read: Callable[[str], object]) -> None:
    export.write(str(tmp_path), {"w": torch.zeros(2)}, {}, parents={})
    pipe = tmp_path / export.WEIGHTS
    pipe.unlink()
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="not a regular file"):
        read(str(pipe))


def test_a_name_too_long_for_any_file_is_none(tmp_path: Path) -> None:
    long = f"{tmp_path}/{'x' * 630}"
    assert not storage.exists(long) and not files.is_folder(Path(long))
    with pytest.raises(ReportedError, match="File name too long"):
        load_run("x" * 630, [])
