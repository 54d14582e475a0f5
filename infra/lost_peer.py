"""What a rank meets whose peer has ended, and whether that peer said why: then this rank has nothing to add."""

from __future__ import annotations

import re
import time

from infra.errors import ExitCode
from infra.run_folder import RunFolder

WAIT_S = 5.0
"""A shared file system or an object store shows another node's record after a moment."""
_POLL_S = 0.25
_GONE = re.compile(
    r"connection (closed|reset) by peer|broken pipe|connection refused|remote process exited|socket closed|socket timeout", re.IGNORECASE
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what collectives raise (gloo, NCCL and torch's store, which have no class of their own for it) once another rank is gone."""
    ours = type(error).__module__.partition(".")[0] in ("builtins", "torch")  # boto3 has connections too, and another way to lose them
    return ours and isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def why_peer_ended(run: RunFolder, stage: str, attempt: int, rank: int, wait_s: float = WAIT_S) -> str:
    """'rank 0: ...' as soon as another rank has recorded an end by fault in this attempt; '' if none has in time: it was killed."""
    deadline = time.monotonic() + wait_s
    while True:
        for record in run.records(stage, attempt):
            if record["rank"] != rank and record["code"] not in (ExitCode.DONE, ExitCode.REQUEUE):
                return f"rank {record['rank']}: {record['reason']}"
        if time.monotonic() > deadline:
            return ""
        time.sleep(_POLL_S)
