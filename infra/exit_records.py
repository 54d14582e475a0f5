"""How the ranks of an attempt ended (docs/contracts.md, section 1): what is written of it, and what is read.

    attempt-<k>/rank-<r>.json   a rank that ended with anything but 0 and 75, by itself and at once: others ask for its reason
                node-<n>.json   the ranks of a node, by its launcher once all of them have ended: those that ended with 0 or 75, told apart by reason
                lost.json       nodes that gave no sign any more, by node 0, where others may still say why they ended
                end.json        how the attempt ended, by node 0 where all nodes have said how they did, else by who finds it without an end

So an attempt of 1,024 ranks on 128 nodes leaves 130 files, of which each is read once, by node 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infra import run_records, storage, stored
from infra.errors import ExitCode

ALIKE = (ExitCode.DONE, ExitCode.REQUEUE)
"""Ends that need nobody's attention: they are summed up."""
_OWN_CODES = (ExitCode.USAGE, ExitCode.DATA, ExitCode.CONFIG, ExitCode.DIVERGED)

Record = dict[str, Any]


def summary(node: int, ranks: int, left: Sequence[Record]) -> dict[str, Any]:
    """What a launcher writes of its node.

    Args:
        ranks: ranks that it has started, all of which have ended.
        left: records that they left behind, by rank.
    """
    groups: dict[tuple[int, str], list[list[float]]] = {}
    for record in left:
        groups.setdefault((record["code"], record["reason"]), []).append([record["rank"], record["time"]])
    alike = [{"code": code, "reason": reason, "ranks": members} for (code, reason), members in groups.items()]
    return {"node": node, "ranks": ranks, "alike": alike}


class Records:
    """Records of one attempt as they come in. Each file is read once, however often one looks: what is written is not written again.

    Args:
        url: folder of the attempt.
        most: files that are read of ranks that said why they ended; None: all.
    """

    def __init__(self, url: str, most: int | None = None) -> None:
        self._url, self._most = url, most
        self._ranks: dict[str, Record] = {}
        self._nodes: dict[str, Record] = {}

    def look(self) -> list[Record]:
        """How the ranks ended, those that have, the earliest first."""
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
        """Whether all of ``size`` ranks have ended, by what was seen so far."""
        told = len(self._ranks) + sum(len(group["ranks"]) for node in self._nodes.values() for group in node["alike"])
        return max(told, sum(int(node["ranks"]) for node in self._nodes.values())) >= size


def says_enough(records: Sequence[Record]) -> bool:
    """Whether one has a code of its own: nothing that comes later matters."""
    return any(record["code"] in _OWN_CODES for record in records)


def root_cause(records: Sequence[Record], size: int) -> tuple[int, str]:
    """Exit code and reason of an attempt: the earliest record with a code of its own, then a rank that left none, then a crash, then 75.

    Args:
        records: the earliest first.
        size: ranks of the attempt.
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
