"""Faults between a loader and its shards on a real S3 server, and what comes of each. ``python -m tests.support.data_faults`` writes docs/data_faults.md."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np

from data_pipeline.loading.loaders import ShardLoader
from data_pipeline.shards.shard_set import CODES_SCHEMA, CodeRecord, ShardSet
from data_pipeline.shards.versions import write_set
from infra import s3, storage
from infra.errors import DataError, ReportedError
from infra.world import World
from tests.support import odd_inputs
from tests.support.fault_proxy import FaultProxy, Rule, fault_proxy
from tests.support.root import ROOT

PAGE = ROOT / "docs" / "data_faults.md"
RECORDS = 41
ATTEMPTS = 3  # instead of infra.s3.MAX_ATTEMPTS, and no waiting between them
SILENCE_S = 30.0  # instead of infra.s3.READ_TIMEOUT_S; less for faults that are silent
_SHARD = r"GET .*part-00000/shard\.00002\.mds"


@dataclass(frozen=True)
class Fault:
    """One fault, and how it must end."""

    what: str
    rules: Callable[[], list[Rule]] = list
    stored: Callable[[bytes], bytes] | None = None
    """What becomes of the stored object; empty: it is deleted."""
    ends: str = ""
    """Words of the error; empty: every sample arrives."""
    requests: int = 0
    """Requests for the shard that it takes; 0: not looked at (what looks ahead asks too, and who needs the shard asks again)."""
    silence_s: float = SILENCE_S
    """Silence after which a request counts as broken."""


def _always(kind: str, **settings: int) -> Callable[[], list[Rule]]:
    return lambda: [Rule(_SHARD, kind, -1, **settings)]  # type: ignore[arg-type]


def _times(kind: str, count: int, **settings: int) -> Callable[[], list[Rule]]:
    return lambda: [Rule(_SHARD, kind, count, **settings)]  # type: ignore[arg-type]


FAULTS = (
    Fault("throttled twice (503 SlowDown)", _times("503", 2), requests=3),
    Fault("throttled without end", _always("503"), ends="SlowDown"),
    Fault("server error twice (500)", _times("500", 2), requests=3),
    Fault("connection reset before the answer, twice", _times("reset", 2), requests=3),
    Fault("connection reset before every answer", _always("reset"), ends=f"failed after {ATTEMPTS} attempts"),
    Fault("connection reset within the body, twice", _times("reset_body", 2), requests=3),
    Fault("connection reset within every body", _always("reset_body"), ends=f"failed after {ATTEMPTS} attempts"),
    Fault("truncated object, twice", _times("truncate", 2), requests=3),
    Fault("truncated object, always", _always("truncate"), ends=f"failed after {ATTEMPTS} attempts"),
    Fault("slow (10 kB/s)", _always("slow", bytes_per_s=10_000), requests=1),
    Fault("silence within the body, once", _times("stall", 1), requests=2, silence_s=3.0),
    Fault("silence within every body", _always("stall"), ends=f"failed after {ATTEMPTS} attempts", silence_s=0.5),
    Fault("no answer, once", _times("hang", 1), requests=2, silence_s=3.0),
    Fault("no answer, ever", _always("hang"), ends=f"failed after {ATTEMPTS} attempts", silence_s=0.5),
    Fault("flipped byte, once", _times("corrupt", 1, after=600), requests=2),
    Fault("flipped byte, always", _always("corrupt", after=600), ends=f"failed after {ATTEMPTS} attempts (Expected checksum"),
    Fault("flipped byte in the stored object", stored=lambda data: data[:-1] + bytes([data[-1] ^ 1]), ends="also when fetched again", requests=2),
    Fault("stored object cut short", stored=lambda data: data[:-7], ends="also when fetched again", requests=2),
    Fault("stored object of the right size, but all zero", stored=lambda data: bytes(len(data)), ends="also when fetched again", requests=2),
    Fault("object missing", stored=lambda data: b"", ends="does not exist"),
)


def code_set(url: str, records: int = RECORDS, shard_bytes: int = 2000) -> ShardSet:
    """A small set of several shards."""
    parts = [CodeRecord(f"id-{number}", [f"caption {number}"] * 9, np.full(8, number, np.uint16), {}, 0, 0) for number in range(records)]
    return write_set(url, [parts], CODES_SCHEMA, shard_bytes=shard_bytes)


@contextmanager
def impatient(silence_s: float = SILENCE_S) -> Iterator[None]:
    """Few attempts without waiting, and soon tired of silence."""
    with (
        mock.patch.object(s3, "MAX_ATTEMPTS", ATTEMPTS),
        mock.patch.object(s3, "BACKOFF_S", 0.0),
        mock.patch.object(s3, "READ_TIMEOUT_S", silence_s),
        mock.patch("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None)),
    ):
        yield


def read_epoch(shard_set: ShardSet, cache: str, workers: int = 0) -> list[str]:
    """Ids of an epoch, or the error that ended it."""
    loader = ShardLoader([shard_set], cache, World.single(), 1, 0, lambda record, epoch: str(record["id"]), list, workers=workers)
    try:
        return [loader.next()[0] for _ in range(shard_set.count)]
    finally:
        loader.close()


def run(fault: Fault, proxy: FaultProxy, shard_set: ShardSet) -> str:
    """Read an epoch through a fault; the outcome in words, of which ``check`` approves or not."""
    proxy.rules, proxy.requests, proxy.injected = fault.rules(), [], []
    name = storage.join(shard_set.url, "part-00000/shard.00002.mds")
    original = storage.read_bytes(name)
    if fault.stored is not None:
        storage.delete(name)
        if fault.stored(original):
            storage.write_bytes(name, fault.stored(original))
    try:
        return _outcome(fault, proxy, shard_set)
    finally:
        storage.write_bytes(name, original)


def _outcome(fault: Fault, proxy: FaultProxy, shard_set: ShardSet) -> str:
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"S3_ENDPOINT_URL": proxy.endpoint}), impatient(fault.silence_s):
        try:
            ids = read_epoch(shard_set, cache)
        except ReportedError as error:
            return f"DataError: {error} ({_asked(proxy)})" if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
    whole = sorted(ids) == sorted(f"id-{number}" for number in range(shard_set.count))
    return f"{'every' if whole else 'NOT every'} sample once ({_asked(proxy)})"


def _asked(proxy: FaultProxy) -> str:
    asked = sum("shard.00002.mds" in line and line.startswith("GET") for line in proxy.requests)
    return f"{asked} request{'s' if asked != 1 else ''} for the shard"


def check(fault: Fault, proxy: FaultProxy, outcome: str) -> None:
    """
    Raises:
        AssertionError: the fault did not happen, or did not end as it must.
    """
    assert proxy.injected or fault.stored, "the fault was never met"
    if fault.ends:
        assert outcome.startswith("DataError: s3://") and "part-00000/shard.00002.mds: " in outcome and fault.ends in outcome, outcome
        assert not fault.requests or f"({fault.requests} requests for" in outcome, outcome
    else:
        assert outcome.startswith(f"every sample once ({fault.requests} request"), outcome


def main() -> None:
    """Run all faults against a fresh server, and write the page."""
    from tests.support.s3_server import serve

    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as server:
        os.environ |= {name: value for name, value in server.environment.items() if value is not None}
        bucket = server.create_bucket()
        url = f"s3://{bucket}/set"
        shard_set = code_set(url)
        lines = []
        with fault_proxy(server.endpoint) as proxy:
            for fault in FAULTS:
                outcome = run(fault, proxy, shard_set)
                check(fault, proxy, outcome)
                lines.append(
                    f"| {fault.what} | {outcome.replace(url, 's3://BUCKET/SET').replace('|', '/').replace(proxy.endpoint, 'http://HOST').replace(bucket, 'BUCKET')} |"
                )
                print(lines[-1])
    PAGE.write_text(
        f"""# What comes of faults between a loader and its shards

Made by `python -m tests.support.data_faults`: a loader reads an epoch of {RECORDS} records in several shards from a real S3 server (SeaweedFS) through a proxy
that breaks the requests for one of them (`tests/support/fault_proxy.py`). Do not edit. `tests/data_pipeline/loading/test_loaders_faults.py` checks the same outcomes. Here a request
has {ATTEMPTS} attempts without waiting and {SILENCE_S:.0f} s of silence (less for faults that are silent); in earnest it has {s3.MAX_ATTEMPTS} with growing waits
and {s3.READ_TIMEOUT_S:.0f} s (`infra/s3.py`).

| fault | outcome |
|---|---|
"""
        + "\n".join(lines)
        + "\n\n"
        + odd_inputs.section()
    )


if __name__ == "__main__":
    main()
