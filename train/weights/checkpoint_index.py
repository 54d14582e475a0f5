"""index.json of a checkpoint and the parts that it names: what they must be, and which stored pieces hold the elements that a rank wants.

    index.json     for each tensor dtype, size and runs: ranks that follow each other and hold as many elements each, the last perhaps fewer;
                   for each rank that wrote a file, bytes and SHA-256 of its part
    rank-N.json    the part of rank N: where the tensors' pieces lie in rank-N.bin, and their SHA-256

A reader expands the runs that it needs and reads the parts of their ranks, and no others. Files are named by a rank's number alone.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Protocol, Self, get_args

import numpy as np
import torch
from pydantic import Field, model_validator

from infra import node_folder, schemas, storage, strict_json
from infra.errors import CheckpointError
from infra.overlapped import overlapped
from infra.stored import Count, Sha256, Stored, check

INDEX = "index.json"
_Dtype = Literal["float32", "float16", "bfloat16", "float64", "int16", "int32", "int64", "int8", "uint8", "bool"]
DTYPES: tuple[str, ...] = get_args(_Dtype)
MOST_BYTES = 1 << 30
"""Of a stored piece: a bound for what is read at once, far above what is written."""
_AHEAD = 4
"""Parts of the index that are on their way at once."""
_SHARED = 64
"""Where a checkpoint has at most so many parts, ranks of a node read the same ones more often than not, and fetch them once (replicas, sharding by node)."""
_TRIES = 2
_REMEDY = "train in a new run folder: launcher.py STAGE PRESET run.name=NAME"
_Positive = Annotated[int, Field(ge=1, lt=1 << 53)]


@dataclass(frozen=True)
class Place:
    """Where a stored piece lies."""

    file: str
    start: int
    bytes: int
    sha256: str
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.bytes


@dataclass(frozen=True)
class Wanted:
    """Elements of a tensor that a rank wants, at least one."""

    name: str
    first: int
    end: int


@dataclass(frozen=True)
class Piece:
    """A stored piece that holds some of them."""

    place: Place
    offset: int
    """Its first element in the tensor."""
    wanted: int
    """Number of the wanted elements, in the list that was asked with."""


@dataclass(frozen=True)
class Kind:
    """What a tensor is."""

    dtype: torch.dtype
    size: int


class Catalogue(Protocol):
    """An index that was read."""

    kinds: dict[str, Kind]

    def files(self, wanted: Sequence[Wanted]) -> Iterator[list[Piece]]:
        """For each file that holds anything of it, the pieces to be read."""
        ...


class Chunk(Stored):
    """Of the older index: where a piece of a tensor lies, in one file of the checkpoint's folder and nowhere else."""

    file: Annotated[str, Field(pattern=r"^rank-[0-9]{1,9}\.bin$")]
    start: Count
    bytes: Annotated[int, Field(ge=0, le=MOST_BYTES)]
    sha256: Sha256
    offset: Count
    length: Count


class ChunkedTensor(Stored):
    """A tensor in the older index."""

    dtype: _Dtype
    size: Count
    chunks: list[Chunk]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not _follow([(chunk.offset, chunk.offset + chunk.length) for chunk in self.chunks], self.size):
            raise ValueError(f"its pieces do not make up its {self.size} elements")
        width = getattr(torch, self.dtype).itemsize
        if any(chunk.bytes != chunk.length * width for chunk in self.chunks):
            raise ValueError("a piece has other bytes than its elements take")
        return self


class OlderIndex(Stored):
    """index.json of schema 1: every piece of every rank in one file."""

    tensors: dict[str, ChunkedTensor]


class Run(Stored):
    """Ranks that follow each other and hold elements that do."""

    rank: Count
    """The first one."""
    ranks: _Positive
    start: Count
    """Its first element."""
    each: _Positive
    last: _Positive
    """Elements of the last one, at most ``each``."""

    @property
    def end(self) -> int:
        return self.start + (self.ranks - 1) * self.each + self.last

    def share(self, rank: int) -> tuple[int, int]:
        """Offset and length of what one of them holds."""
        place = rank - self.rank
        return self.start + place * self.each, self.last if place == self.ranks - 1 else self.each


class SpreadTensor(Stored):
    """A tensor in the index."""

    dtype: _Dtype
    size: Count
    runs: list[Run]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if any(run.last > run.each for run in self.runs):
            raise ValueError("the last rank of a run holds more than the others")
        if not _follow([(run.start, run.end) for run in self.runs], self.size):
            raise ValueError(f"its runs do not make up its {self.size} elements")
        ranks = sorted((run.rank, run.rank + run.ranks) for run in self.runs)
        if any(after[0] < before[1] for before, after in pairwise(ranks)):
            raise ValueError("a rank holds two pieces of it")
        return self


class PartFacts(Stored):
    """What a part must be."""

    bytes: Annotated[int, Field(ge=1, le=strict_json.MAX_BYTES)]
    sha256: Sha256


class Index(Stored):
    """index.json."""

    parts: list[PartFacts | None]
    """By rank; None where it wrote nothing."""
    tensors: dict[str, SpreadTensor]

    @model_validator(mode="after")
    def _known(self) -> Self:
        there = np.array([0, *np.cumsum([part is not None for part in self.parts])], np.int64)
        for name, tensor in self.tensors.items():
            for run in tensor.runs:
                if run.rank + run.ranks > len(self.parts) or there[run.rank + run.ranks] - there[run.rank] != run.ranks:
                    raise ValueError(f"'{name[:80]}' lies on ranks that have no part")
        return self


class Holding(Stored):
    """A rank's piece of a tensor, in its file from ``start`` on, in pieces of ``piece`` bytes (of the part) with a hash each."""

    start: Count
    offset: Count
    length: _Positive
    sha256: list[Sha256]


class Part(Stored):
    """rank-N.json."""

    rank: Count
    piece: Annotated[int, Field(ge=1, le=MOST_BYTES)]
    tensors: dict[str, Holding]


def _follow(spans: list[tuple[int, int]], size: int) -> bool:
    """Whether they cover all elements up to ``size``, each once."""
    position = 0
    for start, end in sorted(spans):
        if start != position:
            return False
        position = end
    return position == size


def part_name(rank: int) -> str:
    """File of a rank's part of the index."""
    return f"rank-{rank}.json"


def data_name(rank: int) -> str:
    """File of a rank's tensors."""
    return f"rank-{rank}.bin"


def part_of(rank: int, piece: int, tensors: dict[str, dict[str, Any]]) -> bytes:
    """The bytes of a rank's part; see Part."""
    part = {"schema": schemas.CHECKPOINT, "rank": rank, "piece": piece, "tensors": tensors}
    return json.dumps(part, sort_keys=True).encode() + b"\n"


def index_of(tensors: dict[str, Any], parts: Sequence[tuple[int, bytes] | None]) -> dict[str, Any]:
    """The index.

    Args:
        tensors: see ``layout.tensors``.
        parts: bytes and SHA-256 of each rank's part; None for a rank without tensors.
    """
    facts = [None if part is None else {"bytes": part[0], "sha256": part[1].hex()} for part in parts]
    return {"schema": schemas.CHECKPOINT, "parts": facts, "tensors": tensors}


def catalogue(url: str, index: Any) -> Catalogue:
    """An index whose hash is right.

    Raises:
        DataError: it is not as it must be.
        ConfigError: it is of a schema that this version does not read.
    """
    place = storage.join(url, INDEX)
    if not isinstance(index, dict) or "schema" not in index:
        check(index, OlderIndex, place)
        return _Chunked(index)
    schemas.require(index["schema"], schemas.CHECKPOINT, place, _REMEDY)
    check(index, Index, place)
    return _Spread(url, index)


class _Chunked:
    """Of the older index."""

    def __init__(self, index: dict[str, Any]) -> None:
        self.kinds: dict[str, Kind] = {}
        self._chunks: dict[str, list[tuple[int, Place]]] = {}
        for name, entry in index["tensors"].items():
            dtype = getattr(torch, entry["dtype"])
            self.kinds[name] = Kind(dtype, entry["size"])
            places = ((c["offset"], Place(c["file"], c["start"], c["bytes"], c["sha256"], dtype)) for c in entry["chunks"] if c["length"])
            self._chunks[name] = sorted(places, key=lambda found: found[0])

    def files(self, wanted: Sequence[Wanted]) -> Iterator[list[Piece]]:
        """See Catalogue."""
        found: dict[str, list[Piece]] = {}
        for number, each in enumerate(wanted):
            chunks = self._chunks[each.name]
            for offset, place in chunks[bisect_right(chunks, each.first, key=lambda chunk: chunk[0]) - 1 :]:
                if offset >= each.end:
                    break
                found.setdefault(place.file, []).append(Piece(place, offset, number))
        yield from (found[file] for file in sorted(found))


class _Spread:
    """Of the index in parts."""

    def __init__(self, url: str, index: dict[str, Any]) -> None:
        self.url = url
        self.kinds = {name: Kind(getattr(torch, entry["dtype"]), entry["size"]) for name, entry in index["tensors"].items()}
        runs = {name: [Run.model_construct(**run) for run in entry["runs"]] for name, entry in index["tensors"].items()}
        self._runs = {name: sorted(found, key=lambda run: run.start) for name, found in runs.items()}
        self._facts: list[dict[str, Any] | None] = index["parts"]
        self._is_shared = sum(fact is not None for fact in self._facts) <= _SHARED
        self._known: dict[int, dict[str, Any]] = {}

    def files(self, wanted: Sequence[Wanted]) -> Iterator[list[Piece]]:
        """See Catalogue. Of many parts few are in memory at once."""
        needs = [(number, run, *ranks) for number, each in enumerate(wanted) for run, ranks in self._overlapping(each)]
        low, high = (np.array([need[side] for need in needs], np.int64) for side in (2, 3))
        ranks = [rank for rank in range(len(self._facts)) if ((low <= rank) & (rank <= high)).any()]
        for rank, part in overlapped(self._part, ranks, _AHEAD):
            self._known = dict([*self._known.items(), (rank, part)][-_AHEAD:])
            chosen = np.flatnonzero((low <= rank) & (rank <= high)).tolist()
            yield [piece for place in chosen for piece in self._pieces(rank, part, wanted[needs[place][0]], needs[place][0], needs[place][1])]

    def _overlapping(self, each: Wanted) -> Iterator[tuple[Run, tuple[int, int]]]:
        """Runs that hold any of it, with the first and the last such rank."""
        runs = self._runs[each.name]
        for run in runs[bisect_right(runs, each.first, key=lambda run: run.start) - 1 :]:
            if run.start >= each.end:
                return
            first = max(0, each.first - run.start) // run.each
            last = (min(each.end, run.end) - 1 - run.start) // run.each
            yield run, (run.rank + first, run.rank + last)

    def _pieces(self, rank: int, part: dict[str, Any], wanted: Wanted, number: int, run: Run) -> Iterator[Piece]:
        """What a rank's file holds of wanted elements."""
        dtype, held, (offset, length) = self.kinds[wanted.name].dtype, part["tensors"].get(wanted.name), run.share(rank)
        each = part["piece"] // dtype.itemsize
        if held is None or not each or (held["offset"], held["length"], len(held["sha256"])) != (offset, length, -(-length // each)):
            raise CheckpointError(f"{storage.join(self.url, part_name(rank))}: damaged: it does not hold of '{wanted.name}' what {INDEX} says.")
        for place in range((max(wanted.first, offset) - offset) // each, -(-(min(wanted.end, offset + length) - offset) // each)):
            elements = min(each, length - place * each)
            start = held["start"] + place * each * dtype.itemsize
            yield Piece(Place(data_name(rank), start, elements * dtype.itemsize, held["sha256"][place], dtype), offset + place * each, number)

    def _part(self, rank: int) -> dict[str, Any]:
        """A rank's part, whose hash is right. Fetched again before it is called damaged."""
        if (known := self._known.get(rank)) is not None:
            return known
        facts, place = self._facts[rank], storage.join(self.url, part_name(rank))
        assert facts is not None  # the index was refused otherwise
        for attempt in range(_TRIES):
            read = node_folder.read_once if self._is_shared and not attempt else storage.read_at_most
            data = read(place, facts["bytes"])
            if hashlib.sha256(data).hexdigest() == facts["sha256"]:
                break
        else:
            raise CheckpointError(f"{place}: damaged: its hash is not the one in {INDEX}, also when it is read again.")
        part: dict[str, Any] = storage.parse_json(place, data)
        schemas.require(part.get("schema") if isinstance(part, dict) else None, schemas.CHECKPOINT, place, _REMEDY)
        check(part, Part, place)
        if part["rank"] != rank:
            raise CheckpointError(f"{place}: damaged: it is the part of rank {part['rank']}.")
        return part
