"""A training stage on a real S3 server with one, two and four ranks: what it asks for, as docs/scale.md and ``plan`` say. About 3 minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import counted_requests
from tests.support.fault_proxy import fault_proxy
from tests.support.s3_server import S3Server
from train.engines import replicated
from train.planning import requests

pytestmark = pytest.mark.soak


def test_a_stage_asks_for_what_planning_says_whatever_the_number_of_its_ranks(
    s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = counted_requests.prepared(tmp_path)
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        found = {ranks: counted_requests.counted(proxy, run, f"{s3}/{ranks}/tiny", ranks) for ranks in counted_requests.SIZES}
    for ranks, moments in found.items():
        start, restart = moments["start"], moments["restart"]
        print(f"{ranks} ranks: {sum(start.values())} at a start, {sum(restart.values())} at a restart")
        end, save, restore = (
            requests.end(1),
            requests.save(1, ranks, kept=1),
            requests.restore(1, ranks, kept=1, files=min(ranks, replicated.WRITERS)),
        )
        again = 2 if ranks == 1 else 0  # one process shares nothing with itself: its marker is read three times
        assert start["indexes", "GET"] == restart["indexes", "GET"] == requests.indexes(1).get + again, "whatever the number of ranks"
        assert restart["checkpoints", "GET"] == restore.get and start["checkpoints", "PUT"] == save.put
        assert start["ledger", "PUT"] == requests.begin(1).put + end.put
        for kind in ("configuration", "ledger", "checkpoints"):
            more = {verb: count - found[1]["restart"][kind, verb] for (what, verb), count in restart.items() if what == kind}
            grows = {"PUT": 2 * (ranks - 1), "GET": restore.get - requests.restore(1, 1, kept=1).get}
            allowed = grows if kind == "checkpoints" else {"GET": 2} if kind == "configuration" else {}
            assert all(count <= allowed.get(verb, 0) for verb, count in more.items()), (kind, more)
        heads = sum(count for (what, verb), count in restart.items() if verb == "HEAD" and what not in ("checkpoints", "lease"))
        assert heads <= 1, "none before a GET"
