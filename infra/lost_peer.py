"""What a rank meets whose peer has ended, and whether that peer said why: then this rank has nothing to add."""

from __future__ import annotations

import re
import time

from infra import node_folder, storage, stored
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from infra.run_records import RankRecord

WAIT_S = 5.0
"""A shared file system or an object store shows another node's record after a moment."""
_POLL_S = 0.5
_FEW = 8
AFTER = "ended after "
"""How the reason of a rank begins that has ended after another one, whose reason follows."""
STOPPED = "a stop of "
"""How the answer begins where the peer was asked to stop: that is no fault, here either."""
NOBODY_KNOWS = "another rank is gone"
"""And of one whose peer said nothing."""
_GONE = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|remote process exited|socket closed|socket timeout", re.IGNORECASE
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what collectives raise (gloo, NCCL and torch's store, which have no class of their own for it) once another rank is gone."""
    ours = type(error).__module__.partition(".")[0] in ("builtins", "torch")  # boto3 has connections too, and another way to lose them
    return ours and isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def why_peer_ended(run: RunFolder, stage: str, attempt: int, rank: int, wait_s: float = WAIT_S) -> str:
    """'rank 0: ...' as soon as another rank has recorded an end by fault, or a stop that it was alone with, in this attempt; '' if none has in time: it was
    killed. One rank of a node looks."""
    return node_folder.once(f"why-{stage}-{attempt}", lambda: _look(run, stage, attempt, rank, wait_s).encode()).decode()


def _look(run: RunFolder, stage: str, attempt: int, rank: int, wait_s: float) -> str:
    deadline, url, seen = time.monotonic() + wait_s, run.attempt_url(stage, attempt), {f"rank-{rank}.json"}
    while True:
        new = [name for name in storage.list_level(url) if name.startswith("rank-") and name not in seen]
        for name in new[:_FEW]:  # where hundreds have lost this peer too, any of them says as much
            seen.add(name)
            record = stored.read(storage.join(url, name), RankRecord)
            if record["code"] == ExitCode.DONE or record["reason"].startswith(NOBODY_KNOWS):
                continue
            if record["code"] == ExitCode.REQUEUE:
                return f"{STOPPED}rank {record['rank']}: {record['reason']}"
            return str(record["reason"].removeprefix(AFTER)) if record["reason"].startswith(AFTER) else f"rank {record['rank']}: {record['reason']}"
        if time.monotonic() > deadline:
            return ""
        time.sleep(_POLL_S)
