"""Which rank holds which elements of which tensor, found out in few bytes and kept in few: an even cut over 1,024 ranks is one run.

The main rank says what it holds, and every rank expects of itself its even share of that: the cut of ZeRO's stage 3, of replicas, and of both by node. A rank
tells only what is otherwise, and what the main rank did not name (on stages 1 and 2 a rank holds whole tensors that others do not hold).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from infra.errors import CheckpointError
from train.weights import agreement
from train.weights.checkpoint_index import DTYPES
from train.weights.fragments import Fragment

_COLUMNS = 4
"""Of what a rank tells: a name's number, offset, length, kind."""
_KINDS = 16
"""A tensor's size and dtype are one number: size x 16 + the dtype's place in DTYPES."""


Row = tuple[int, int, int]
"""Offset, length and kind of a rank's piece of a tensor."""


def kind_of(size: int, dtype: str) -> int:
    """Size and dtype of a tensor as one number."""
    return size * _KINDS + DTYPES.index(dtype)


def width_of(kind: int) -> int:
    """Bytes of an element."""
    dtype: torch.dtype = getattr(torch, DTYPES[kind % _KINDS])
    return dtype.itemsize


def held(fragments: Mapping[str, Fragment]) -> dict[str, Row]:
    """What a rank holds, by name.

    Raises:
        CheckpointError: something is no fragment of a tensor, or of a dtype that checkpoints do not keep.
    """
    rows = {}
    for name, fragment in fragments.items():
        if not isinstance(fragment, Fragment):
            raise CheckpointError(f"'{name}' is no fragment of a tensor: other state belongs in meta.json.")
        dtype = str(fragment.tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise CheckpointError(f"'{name}' is of dtype {dtype}, a checkpoint keeps {', '.join(DTYPES)}.")
        if fragment.tensor.numel():
            rows[name] = (fragment.offset, fragment.tensor.numel(), kind_of(fragment.total, dtype))
    return {name: rows[name] for name in sorted(rows)}


class Expected:
    """What each rank expects to hold, given what the main rank does."""

    def __init__(self, told: bytes) -> None:
        names, lengths, kinds = json.loads(told)
        self.names: list[str] = names
        self.codes = {name: code for code, name in enumerate(self.names)}
        self.lengths, self.kinds = np.array(lengths, np.int64), np.array(kinds, np.int64)

    @staticmethod
    def of(own: Mapping[str, Row]) -> bytes:
        """What the main rank tells."""
        return json.dumps([list(own), [row[1] for row in own.values()], [row[2] for row in own.values()]]).encode()

    def share(self, code: int, rank: int) -> tuple[int, int]:
        """Offset and length of a rank's share; beyond the tensor's end it is empty."""
        each, size = int(self.lengths[code]), int(self.kinds[code]) // _KINDS
        offset = rank * each
        return offset, max(0, min(each, size - offset))

    def holders(self, code: int) -> int:
        """Ranks whose share is not empty, if there are as many."""
        return -(-(int(self.kinds[code]) // _KINDS) // int(self.lengths[code]))

    def covers(self, code: int, ranks: int) -> bool:
        """Whether so many ranks hold all of a tensor if all hold their share."""
        return self.holders(code) <= ranks

    def even(self, code: int) -> dict[str, Any]:
        """The index's description of a tensor of which every rank holds its share."""
        each, (size, dtype) = int(self.lengths[code]), divmod(int(self.kinds[code]), _KINDS)
        ranks = self.holders(code)
        run = {"rank": 0, "ranks": ranks, "start": 0, "each": each, "last": size - (ranks - 1) * each}
        return {"dtype": DTYPES[dtype], "size": size, "runs": [run]}

    def differences(self, own: Mapping[str, Row], rank: int) -> bytes:
        """What a rank has to tell: rows of what it holds otherwise (length 0: not at all), then names that were not among those told."""
        rows = []
        for code, name in enumerate(self.names):
            offset, length, kind = own.get(name, (0, 0, int(self.kinds[code])))
            share = self.share(code, rank)
            if kind != self.kinds[code] or ((length or share[1]) and (offset, length) != share):
                rows.append((code, offset, length, kind))
        others = [name for name in own if name not in self.codes]
        rows += [(len(self.names) + place, *own[name]) for place, name in enumerate(others)]
        if not rows:
            return b""
        return json.dumps(others).encode() + b"\n" + np.array(rows, np.int64).tobytes()


def tensors(own: Mapping[str, Row], group: Any = None) -> dict[str, Any] | None:
    """The index's description of every tensor, on the main rank; None on the others. Collective.

    Raises:
        CheckpointError: on all ranks: the ranks' pieces do not make up a tensor, or overlap, or ranks disagree about its size or dtype.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    expected = Expected(agreement.broadcast(Expected.of(own), group))
    told = agreement.gather(expected.differences(own, rank), group)
    found: dict[str, Any] | None = None
    with agreement.alike(group):
        if told is not None:
            found = described(expected, told)
    return found


def described(expected: Expected, told: list[bytes]) -> dict[str, Any]:
    """Dtype, size and runs of every tensor, of what all ranks told.

    Raises:
        CheckpointError: see ``tensors``.
    """
    rows: dict[str, list[tuple[int, int, int, int]]] = {}
    for rank, data in enumerate(told):
        if not data:
            continue
        others, _, table = data.partition(b"\n")
        names = [*expected.names, *json.loads(others)]
        for code, offset, length, kind in np.frombuffer(table, np.int64).reshape(-1, _COLUMNS).tolist():
            rows.setdefault(names[code], []).append((offset, rank, length, kind))
    found = {}
    for name in sorted({*expected.names, *rows}):
        code, differing = expected.codes.get(name), rows.get(name, [])
        if code is not None and not differing and expected.covers(code, len(told)):
            found[name] = expected.even(code)
        else:
            pieces = differing if code is None else differing + _as_expected(expected, code, {row[1] for row in differing}, len(told))
            found[name] = _described(name, pieces)
    return found


def _as_expected(expected: Expected, code: int, but: set[int], ranks: int) -> list[tuple[int, int, int, int]]:
    """Rows of the ranks that told nothing else of a tensor."""
    kind = int(expected.kinds[code])
    shares = {rank: expected.share(code, rank) for rank in range(min(ranks, expected.holders(code))) if rank not in but}
    return [(offset, rank, length, kind) for rank, (offset, length) in shares.items()]


def _described(name: str, pieces: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    kinds = {kind for _, _, _, kind in pieces}
    if len(kinds) > 1:
        told = " and ".join(f"{kind // _KINDS} elements of {DTYPES[kind % _KINDS]}" for kind in sorted(kinds))
        raise CheckpointError(f"'{name}' has {told} on different ranks: no checkpoint can be written of it.")
    size, dtype = divmod(kinds.pop(), _KINDS)
    runs: list[dict[str, int]] = []
    position = 0
    for offset, rank, length, _ in sorted(piece for piece in pieces if piece[2]):
        if offset != position:
            what = f"elements {position} to {offset} on no rank" if offset > position else f"elements {offset} to {position} on two ranks"
            raise CheckpointError(f"'{name}' has {what}: no checkpoint can be written of it.")
        position += length
        run = runs[-1] if runs else None
        if run is not None and rank == run["rank"] + run["ranks"] and run["last"] == run["each"] >= length:
            run["ranks"], run["last"] = run["ranks"] + 1, length
        else:
            runs.append({"rank": rank, "ranks": 1, "start": offset, "each": length, "last": length})
    if position != size:
        raise CheckpointError(f"'{name}' has elements {position} to {size} on no rank: no checkpoint can be written of it.")
    return {"dtype": DTYPES[dtype], "size": size, "runs": runs}
