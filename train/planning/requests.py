"""The number of requests that a training job sends to S3, for any number of nodes and ranks. tests/infra/test_requests.py compares it with requests counted at a
proxy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Requests:
    """Numbers of requests of one event, summed over all nodes."""

    get: int = 0
    put: int = 0
    list: int = 0
    head: int = 0
    delete: int = 0

    @property
    def total(self) -> int:
        return self.get + self.put + self.list + self.head + self.delete


_PAGE = 1000
"""How many names one answer to LIST holds."""


def pages(names: int) -> int:
    """How many answers a listing takes."""
    return max(1, -(-names // _PAGE))


def begin(nodes: int) -> Requests:
    """The ledger at a start, by node 0: the attempts, the checkpoint that was there, begin.json; and each node's versions, written and listed."""
    several = nodes if nodes > 1 else 0
    return Requests(put=1 + several, list=2 + several * pages(nodes), head=1)


def end(nodes: int, faults: int = 0) -> Requests:
    """The ledger at an end: a summary of each node, a record of each rank that ended by fault, all read by node 0, which writes what follows; and each node
    takes back its versions."""
    return Requests(get=nodes + faults, put=nodes + faults + 1, list=pages(nodes + faults + 2), delete=nodes if nodes > 1 else 0)


def restart(nodes: int, faults: int = 1) -> Requests:
    """At a restart by the scheduler, before ``begin``: reading an attempt that has no end.json."""
    return Requests(get=nodes + faults + 2, put=1, list=1 + pages(nodes + faults + 1))


def indexes(nodes: int, sets: int = 2) -> Requests:
    """What a stage opens its sets by: the marker of the stage that made them, and manifest and index of each version, once a node. What was excluded or
    taken down adds a file for each set, or part."""
    return Requests(get=nodes * (1 + 2 * sets))


def save(nodes: int, ranks: int, kept: int) -> Requests:
    """A checkpoint: a file of each rank that writes (all that share a model; of replicas WRITERS) and its part of the index, index and marker; whether the lease
    still holds, twice, where there is one; those kept, of which one goes: its files alone are listed.

    Args:
        ranks: of each node, that write.
        kept: complete checkpoints that stay.
    """
    files = 2 * nodes * ranks + 2
    return Requests(put=files, list=3 + pages(files), head=kept + 2, delete=1 + pages(files))


def restore(nodes: int, ranks: int, kept: int, files: int = 1) -> Requests:
    """The newest checkpoint: its marker once, its index once a node; for each rank at least one range of each file that it reads from, and that file's part of the
    index, once a node where its ranks read the same files.

    Args:
        ranks: of each node.
        files: one where each rank reads what it wrote; of replicas, which read all, as many as write.
    """
    parts = nodes * (ranks if files == 1 else files)
    return Requests(get=1 + nodes + parts + nodes * ranks * files, list=1, head=kept)


def lines(nodes: int, ranks: int, keep: int) -> list[str]:
    """Describe the requests in lines of text, for ``launcher.py plan``."""
    moments = {
        "start": begin(nodes),
        "restart": restart(nodes),
        "indexes of data": indexes(nodes),
        "restore": restore(nodes, ranks, keep),
        "save": save(nodes, ranks, keep),
        "end": end(nodes),
    }
    words = "; ".join(f"{name} {found.total:,}" for name, found in moments.items())
    polled = pages(nodes + 2)
    return [
        f"requests to S3       {words}; none in an update, 0.2 a second of the lease, 0.1 of each node's signs of life, {2 * polled} a second of node 0 while it waits for the others' ends"
    ]
