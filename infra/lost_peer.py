"""Recognises the errors that a rank gets when another rank has ended, and looks up why that rank ended: if it said so, this rank has nothing to add."""

from __future__ import annotations

import re
import time

from infra import node_folder, storage, stored
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from infra.run_records import RankRecord

WAIT_S = 5.0
"""Seconds to wait for another rank's record, which a shared file system or an object store shows with a delay."""
_POLL_S = 0.5
_FEW = 8
AFTER = "ended after "
"""Begins the reason of a rank that ended because another one did; the other rank's reason follows."""
STOPPED = "a stop of "
"""Begins the answer of ``why_peer_ended`` if the other rank was asked to stop, which is no fault of this rank either."""
NOBODY_KNOWS = "another rank is gone"
"""Begins the reason of a rank that ended because another one did, which left no reason."""
_GONE = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|remote process exited|socket closed|socket timeout", re.IGNORECASE
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether collectives raise this error once another rank is gone. gloo, NCCL and torch's store have no class of their own for it, so the text decides."""
    ours = type(error).__module__.partition(".")[0] in ("builtins", "torch")  # boto3's connections break, too, and say so in similar words
    return ours and isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def why_peer_ended(run: RunFolder, stage: str, attempt: int, rank: int, wait_s: float = WAIT_S) -> str:
    """The reason ('rank 0: ...') of another rank of this attempt that has recorded a failure, or a stop that the others had not agreed on.

    Waits for such a record; '' if none appears in time, because the other rank was killed. Only one rank of each node looks; the others take its answer.
    """
    return node_folder.once(f"why-{stage}-{attempt}", lambda: _look(run, stage, attempt, rank, wait_s).encode()).decode()


def _look(run: RunFolder, stage: str, attempt: int, rank: int, wait_s: float) -> str:
    deadline, url, seen = time.monotonic() + wait_s, run.attempt_url(stage, attempt), {f"rank-{rank}.json"}
    while True:
        new = [name for name in storage.list_level(url) if name.startswith("rank-") and name not in seen]
        for name in new[:_FEW]:  # if hundreds of ranks lost the same peer, any of their records says as much
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
