"""The files of a checkpoint: raw bytes and a JSON index in parts through infra.storage, local or s3. No pickle.

Each rank writes and reads by itself; what ranks must know of each other they tell in ``train/weights/agreement.py``.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, cast

import torch

from infra import kept_within, node_folder, storage, streamed_upload, strict_json
from infra.digests import digest
from infra.errors import CheckpointError, DataError, UnreachableError
from infra.overlapped import overlapped
from train.weights.checkpoint_index import INDEX, Catalogue, Kind, Piece, Place, Wanted, catalogue, data_name, index_of, part_name, part_of
from train.weights.fragments import Fragment

PIECE_BYTES = 4 << 20
"""Larger fragments are stored in pieces of this many bytes, each with its hash. A run that divides tensors differently then reads and checks only the pieces
that it needs, not whole fragments."""
READ_BYTES = 32 << 20
"""Pieces that lie near each other are read by one request of at most this many bytes; a longer piece is read by several."""
GAP_BYTES = 1 << 20
"""Two pieces with at most this many unneeded bytes between them are read together: that is cheaper than a second request."""
READERS = 4
"""Number of simultaneous requests."""
_TRIES = 2


@dataclass(frozen=True)
class _Wanted:
    """A stored piece, and what is read of it."""

    place: Place
    offset: int
    fragment: Fragment


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class Writer:
    """A rank's file, and its part of the index once the file is there."""

    def __init__(self, url: str, rank: int) -> None:
        self.url, self.rank = url, rank
        self.part: tuple[int, bytes] | None = None
        """Bytes and SHA-256 of the part, once it is written; None for a rank without tensors."""
        self._tensors: dict[str, dict[str, Any]] = {}

    def write(self, fragments: Mapping[str, Fragment]) -> None:
        """Write this rank's tensors one after another, in pieces with a SHA-256 each, then its part of the index. A rank that has none, such as a replica on
        another node, writes no file."""
        own = {name: fragment for name, fragment in fragments.items() if fragment.tensor.numel()}
        if not own:
            return
        target = storage.join(self.url, data_name(self.rank))
        if storage.is_remote(self.url):
            size = sum(fragment.tensor.nbytes for fragment in own.values())
            streamed_upload.upload(self._pieces(own), size, target)
        else:
            path = storage.local_path(target).with_suffix(".part")
            kept_within.check(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in self._pieces(own):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            path.replace(storage.local_path(target))
        data = part_of(self.rank, PIECE_BYTES, self._tensors)
        storage.write_bytes(storage.join(self.url, part_name(self.rank)), data)
        self.part = len(data), hashlib.sha256(data).digest()

    def _pieces(self, own: Mapping[str, Fragment]) -> Iterator[memoryview]:
        """The bytes of the tensors in order; where they lie and their hashes are noted."""
        position = 0
        for name, fragment in own.items():
            noted: dict[str, Any] = {"start": position, "offset": fragment.offset, "length": fragment.tensor.numel(), "sha256": []}
            self._tensors[name] = noted
            for piece in fragment.tensor.split(PIECE_BYTES // fragment.tensor.itemsize):
                data = _bytes_of(piece)
                noted["sha256"].append(hashlib.sha256(data).hexdigest())
                position += len(data)
                yield data


def write_index(url: str, tensors: dict[str, Any], parts: list[tuple[int, bytes] | None]) -> str:
    """Write the index, once all parts are there, and return its digest; see ``index_of``."""
    index = index_of(tensors, parts)
    storage.write_json(storage.join(url, INDEX), index)
    return digest(index)


class Reader:
    """Reads the pieces of a checkpoint that are needed, and refuses those whose hash differs."""

    def __init__(self, url: str, index_digest: str) -> None:
        """
        Args:
            index_digest: the digest that index.json must have.
        """
        self.url, self.index_digest = url, index_digest
        self._catalogue: Catalogue | None = None

    def catalogue(self) -> Catalogue:
        """The tensors that index.json names, which is read once.

        Raises:
            CheckpointError: it is damaged.
        """
        if self._catalogue is None:
            place = storage.join(self.url, INDEX)
            for read in (node_folder.read_once, storage.read_at_most):  # the node's copy may be of a damaged one that this attempt has written anew
                index = storage.parse_json(place, read(place, strict_json.MAX_BYTES))
                if digest(index) == self.index_digest:
                    break
            else:
                raise CheckpointError(f"{place}: damaged: its hash is not the one in meta.json.")
            self._catalogue = catalogue(self.url, index)
        return self._catalogue

    def fill(self, fragments: Mapping[str, Fragment]) -> None:
        """Restore fragments in place. The stored pieces may be divided in any other way; each that holds some of them is read and checked once.

        Raises:
            CheckpointError: a tensor is missing, or has another size or another kind of dtype; a file is missing or too short, or the hash of a piece differs.
            UnreachableError: the storage does not answer.
        """
        wanted = _checked(fragments, self.catalogue().kinds)
        # Buffers are used again: of a gigabyte, new ones would cost as much time for their pages as the hashes. One is being copied from while all others are filled.
        free: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(READERS + 1):
            free.put(torch.empty(0, dtype=torch.uint8))
        for run, data in overlapped(lambda run: self._fetch(run, free.get()), self._runs(wanted), READERS):
            for each in run:
                begin = each.place.start - run[0].place.start
                stored = data[begin : begin + each.place.bytes]
                if begin % each.place.dtype.itemsize:
                    stored = stored.clone()  # elements must be aligned, whatever lies before them in the file
                _copy(stored.view(each.place.dtype), each)
            free.put(data)

    def _runs(self, fragments: Mapping[str, Fragment]) -> Iterator[list[_Wanted]]:
        """What is to be read, file by file, in groups that one request reads."""
        wanted = [Wanted(name, fragment.offset, fragment.offset + fragment.tensor.numel()) for name, fragment in fragments.items()]
        for pieces in self.catalogue().files(wanted):
            yield from _neighbours(sorted(pieces, key=lambda piece: piece.place.start), list(fragments.values()))

    def _fetch(self, run: list[_Wanted], buffer: torch.Tensor) -> torch.Tensor:
        """The bytes of neighbours in a file, whose hashes are right, in ``buffer`` or in a larger one. Read again before they are called damaged: S3 checks no
        ranges on their way."""
        places = [each.place for each in run]
        url, start, size = storage.join(self.url, places[0].file), places[0].start, places[-1].end - places[0].start
        if len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        data = memoryview(buffer.numpy())[:size]
        for _ in range(_TRIES):
            try:
                for done in range(0, size, READ_BYTES):
                    fill(url, start + done, data[done : done + READ_BYTES])
            except UnreachableError:
                raise
            except DataError as error:
                raise CheckpointError(f"damaged: {error}") from error
            odd = [place for place in places if hashlib.sha256(data[place.start - start : place.end - start]).hexdigest() != place.sha256]
            if not odd:
                return buffer
        raise CheckpointError(f"{url}: damaged: the hash of bytes {odd[0].start} to {odd[0].end} differs, also when they are read again.")


def _checked(fragments: Mapping[str, Fragment], kinds: Mapping[str, Kind]) -> dict[str, Fragment]:
    """Those that are not empty: which stored pieces they overlap is found file by file, as they are read.

    Raises:
        CheckpointError: a tensor is missing, or has another size or another kind of dtype.
    """
    for name, fragment in fragments.items():
        stored = kinds.get(name)
        if stored is None:
            raise CheckpointError(f"holds no '{name}'.")
        if stored.size != fragment.total:
            raise CheckpointError(f"'{name}' has {stored.size} elements, this configuration builds {fragment.total}.")
        wanted = fragment.tensor.dtype
        if stored.dtype.is_floating_point != wanted.is_floating_point:
            raise CheckpointError(f"'{name}' is kept as {stored.dtype}, this configuration holds {wanted}: set moments as the checkpoint has them.")
    return {name: fragment for name, fragment in fragments.items() if fragment.tensor.numel()}


def _copy(stored: torch.Tensor, each: _Wanted) -> None:
    """Put the elements of a piece that are wanted where they belong."""
    first, target = each.fragment.offset, each.fragment.tensor.detach()
    start, end = max(first, each.offset), min(first + len(target), each.offset + len(stored))
    target[start - first : end - first].copy_(stored[start - each.offset : end - each.offset])


def fill(url: str, start: int, target: memoryview) -> None:
    """Read bytes of a file or object, from ``start`` on, until ``target`` is full; a local file without a copy between.

    Raises:
        DataError: as storage.read_range.
    """
    if storage.is_remote(url):
        target[:] = storage.read_range(url, start, len(target))
        return
    with storage.open_stream(url, start) as file:
        read = cast(io.BufferedIOBase, file).readinto(target)
    if read != len(target):
        raise DataError(f"{url}: ends after {start + read} bytes, {start + len(target)} were expected; run the stage that wrote it again.")


def _neighbours(pieces: list[Piece], fragments: list[Fragment]) -> Iterator[list[_Wanted]]:
    """Pieces of a file in the order of their positions, in groups that one request reads; longer ones than READ_BYTES stand alone."""
    run: list[_Wanted] = []
    for piece in pieces:
        place = piece.place
        if run and (place.start > run[-1].place.end + GAP_BYTES or place.end > run[0].place.start + READ_BYTES):
            yield run
            run = []
        run.append(_Wanted(place, piece.offset, fragments[piece.wanted]))
    if run:
        yield run
