"""The records of how the ranks of an attempt ended (docs/contracts.md, section 1): how they are written and read. The one parser of these files.

    attempt-<k>/rank-<r>.json   one rank that ended with any code but 0 and 75; written by that rank at once, because other ranks look for its reason
                node-<n>.json   the ranks of one node that ended with 0 or 75, grouped by reason; written by its launcher once all of them have ended
                lost.json       which nodes stopped giving signs of life; written by node 0, while other nodes may still record why they ended
                end.json        how the attempt ended; written by node 0 once all nodes have reported, else by whoever finds the attempt without it

So an attempt of 1,024 ranks on 128 nodes leaves 130 files, and node 0 reads each of them once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra import run_records, storage, stored
from infra.errors import ExitCode

ALIKE = (ExitCode.DONE, ExitCode.REQUEUE)
"""Exit codes that need nobody's attention: a node's ranks with these share one summary file."""
_OWN_CODES = (ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.DIVERGED)

Record = dict[str, Any]


def summary(node: int, ranks: int, left: Sequence[Record]) -> dict[str, Any]:
    """The content of node-<n>.json.

    Args:
        ranks: how many ranks the launcher has started, all of which have ended.
        left: the records that they left on the node, ordered by rank.
    """
    groups: dict[tuple[int, str], list[list[float]]] = {}
    for record in left:
        groups.setdefault((record["code"], record["reason"]), []).append([record["rank"], record["time"]])
    alike = [{"code": code, "reason": reason, "ranks": members} for (code, reason), members in groups.items()]
    return {"node": node, "ranks": ranks, "alike": alike}


class Records:
    """The records of one attempt as they appear. Each file is read once, however often ``look`` is called: a record is never rewritten.

    Args:
        url: folder of the attempt.
        most: how many of the rank-<r>.json files are read; None: all.
    """

    def __init__(self, url: str, most: int | None = None) -> None:
        self._url, self._most = url, most
        self._ranks: dict[str, Record] = {}
        self._nodes: dict[str, Record] = {}

    def look(self) -> list[Record]:
        """The records of the ranks that have ended so far, the earliest first."""
        for name in storage.list_level(self._url):
            if name.startswith("rank-") and name not in self._ranks and (self._most is None or len(self._ranks) < self._most):
                self._ranks[name] = stored.read(storage.join(self._url, name), run_records.RankRecord)
            if name.startswith("node-") and name not in self._nodes:
                self._nodes[name] = stored.read(storage.join(self._url, name), run_records.NodeSummary)
        alike = [
            group | {"rank": int(rank), "time": time} for node in self._nodes.values() for group in node["alike"] for rank, time in group["ranks"]
        ]
        return sorted([*self._ranks.values(), *alike], key=lambda record: (record["time"], record["rank"]))

    def complete(self, size: int) -> bool:
        """Whether all of ``size`` ranks have ended, as far as ``look`` has seen."""
        told = len(self._ranks) + sum(len(group["ranks"]) for node in self._nodes.values() for group in node["alike"])
        return max(told, sum(int(node["ranks"]) for node in self._nodes.values())) >= size


def says_enough(records: Sequence[Record]) -> bool:
    """Whether a record has a code that decides the attempt, so that later records do not matter."""
    return any(record["code"] in _OWN_CODES for record in records)


def root_cause(records: Sequence[Record], size: int) -> tuple[int, str]:
    """Exit code and reason of an attempt. In order of precedence: the earliest record with 64, 65, 78 or 93; a rank without a record; a crash; 75.

    Args:
        records: the earliest first.
        size: number of ranks of the attempt.
    """
    for record in records:
        if record["code"] in _OWN_CODES:
            return record["code"], f"rank {record['rank']}: {record['reason']}"
    if len(records) < size:
        silent = sorted(set(range(size)) - {record["rank"] for record in records})
        said = next((f"; rank {record['rank']}: {record['reason']}" for record in records if record["code"] == ExitCode.CRASH), "")
        return ExitCode.CRASH, f"rank {silent[0]} ended without a record: it was killed{said}"
    for record in records:
        if record["code"] not in ALIKE:
            return ExitCode.CRASH, f"rank {record['rank']}: {record['reason']}"
    for record in records:
        if record["code"] == ExitCode.REQUEUE:
            return ExitCode.REQUEUE, record["reason"]
    return ExitCode.DONE, "finished"
