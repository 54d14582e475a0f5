"""Names of objects on Google's and Azure's storage that their libraries or servers take for other ones; secrets in such URLs. No server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infra import cloud, objects, shown, storage
from infra.errors import ConfigError, DataError
from tests.support import cloud_servers
from train.config import load_run

SCHEMES = ("gs", "az")
USUAL = (
    "a/x",
    "a/y z.txt",
    "b/[odd] %20#*?.bin",
    "a%2F..%2Fb",
    "ü/你好.txt",
    "a?b",
    "a//b",
    "...",
    "a/..b",
    "x@y.dfs.core.windows.net/z",
    "az://c/x",
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of which the libraries are asked something; they answer nothing."""
    paths: list[str] = []
    for scheme in SCHEMES:
        if lacking := cloud_servers.lacking(scheme):
            pytest.skip(lacking)

    def noted(path: str, *_: Any, **__: Any) -> bytes:
        paths.append(path)
        return b""

    def files(url: str) -> Any:
        from adlfs import AzureBlobFileSystem
        from gcsfs import GCSFileSystem

        kind: Any = GCSFileSystem if url.startswith("gs://") else AzureBlobFileSystem

        class Asked(kind):  # type: ignore[misc]
            version_aware = False
            cachable = False

            def __init__(self) -> None:
                self._intrans = False

            def __getattribute__(self, name: str) -> Any:
                if name in ("cat_file", "pipe_file", "rm_file", "info", "put_file"):
                    return noted
                return super().__getattribute__(name)

        return object.__new__(Asked)

    monkeypatch.setattr(cloud, "_files", files)
    return paths


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_name_that_stands_for_another_object_is_neither_read_written_nor_deleted(scheme: str, asked: list[str]) -> None:
    names = ["a/../b", "..", "a/..", "./a", "a/./b", "/etc/passwd"]
    names += ["a?versionid=2", "a\nb", "a\tb", "a\r"] if scheme == "az" else []
    for name in names:
        url = f"{scheme}://bucket/{name}"
        for act in (lambda url: storage.write_bytes(url, b"x"), storage.delete, lambda url: cloud.read_range(url, 0, 4), cloud.read):
            with pytest.raises(DataError, match="an object of another name would be meant by it; rename this one, or delete it"):
                act(url)
    assert asked == []
    for name in USUAL:
        cloud.delete(f"{scheme}://bucket/{name}")
    assert asked == [f"bucket/{name}" for name in USUAL]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_of_somebody_else_is_not_copied_where_a_name_leads_out_of_it(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("../evil", "a/../../evil", "/evil", "a//../../evil"):
        monkeypatch.setattr(cloud, "list_objects", lambda *args, name=name, **more: iter([(name, 4, "v")]))
        monkeypatch.setattr(cloud, "list_names", lambda *args, name=name: [name])
        monkeypatch.setattr(cloud, "download", lambda *args: pytest.fail("it was fetched"))
        with pytest.raises(DataError, match="evil"):
            storage.download_folder(f"{scheme}://bucket/set", tmp_path / "copy")
    assert objects.store(f"{scheme}://bucket/set") is cloud


SECRETS = [
    *("az://KEY:SECRETVALUE@container/x", "gs://KEY:SECRETVALUE@bucket/x", "gs://SECRETVALUE@bucket", "gs:/KEY:SECRETVALUE@bucket"),
    *("az://container/x?sv=2020&sig=SECRETVALUE", "az://container/x#sig=SECRETVALUE", "az://container/x?se=1&sig%3DSECRETVALUE"),
    *("gs://bucket/x?X-Goog-Signature=SECRETVALUE", "gs://bucket/x?X-Goog-Credential=SECRETVALUE", "gs://bucket/x?access_token=SECRETVALUE"),
]


@pytest.mark.parametrize("url", SECRETS)
def test_secrets_in_urls_of_either_store_are_masked_and_refused_as_any_place(url: str) -> None:
    assert "SECRETVALUE" not in shown.message(f"{url}: does not exist")
    for word in (f"run.root={url}", f"data.images={url}", f"data.takedown={url}", f'data.sources="{url}"'):
        with pytest.raises(ConfigError) as refused:
            load_run("tiny", [word])
        assert "a URL may not carry a user, a password or a signature" in str(refused.value) and "SECRETVALUE" not in str(refused.value)
