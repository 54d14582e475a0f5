"""What the index of a checkpoint takes at the size of the largest preset, without a tensor: ``python -m tests.support.index_size`` prints it, older against newer.

Of the older index a share of the tensors is made and parsed, and counted up: the whole takes more memory than most machines have.
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from infra import storage
from infra.digests import digest
from train.config import load_run
from train.planning import wire
from train.planning.index_part import NO_HASH, index_part
from train.weights import layout
from train.weights.checkpoint_index import catalogue, index_of
from train.weights.checkpoint_storage import PIECE_BYTES

STATES = ("model", "average", "optimizer/exp_avg", "optimizer/exp_avg_sq")
_SHARE = 64


@dataclass(frozen=True)
class Cut:
    """A model's tensors as flat stage 3 cuts them."""

    sizes: dict[str, int]
    ranks: int

    def share(self, name: str, rank: int) -> tuple[int, int]:
        """Offset and length of a rank's piece."""
        each = -(-self.sizes[name] // self.ranks)
        return rank * each, max(0, min(each, self.sizes[name] - rank * each))

    def rows(self, rank: int) -> dict[str, layout.Row]:
        """What a rank holds."""
        shares = {name: self.share(name, rank) for name in sorted(self.sizes)}
        return {name: (*share, layout.kind_of(self.sizes[name], "float32")) for name, share in shares.items() if share[1]}


def cut(preset: str, ranks: int) -> Cut:
    """Masters, average and moments of a preset's transformer."""
    cfg = load_run(preset, [])
    parameters = list(wire.parameters(cfg.dalle, cfg.stream_shape()))
    return Cut({f"{state}/{p.name}": p.elements for state in STATES for p in parameters}, ranks)


def newer_index(found: Cut, told: list[int]) -> tuple[dict[str, Any], list[bytes]]:
    """The index, and what the named ranks would tell the main rank; the others are taken to tell as little."""
    expected = layout.Expected(layout.Expected.of(found.rows(0)))
    words = [expected.differences(found.rows(rank), rank) for rank in told]
    tensors = layout.described(expected, [b""] * found.ranks)
    return index_of(tensors, [(len(newer_part(found, 0)), bytes(32))] * found.ranks), words


def newer_part(found: Cut, rank: int) -> bytes:
    """A rank's part."""
    return index_part(rank, found.rows(rank))


def older_index(found: Cut) -> dict[str, Any]:
    """The same as schema 1 had it."""
    tensors = {}
    for name, size in found.sizes.items():
        chunks, most = [], PIECE_BYTES // 4
        for rank in range(found.ranks):
            offset, length = found.share(name, rank)
            for start in range(offset, offset + length, most):
                count = min(most, offset + length - start)
                place = {"file": f"rank-{rank}.bin", "start": 4 * start // found.ranks, "bytes": 4 * count, "sha256": NO_HASH}
                chunks.append({"offset": start, "length": count} | place)
        tensors[name] = {"dtype": "float32", "size": size, "chunks": chunks}
    return {"tensors": tensors}


def written(index: dict[str, Any]) -> bytes:
    """As it is stored."""
    return json.dumps(index, indent=2, sort_keys=True).encode()


def older_items(found: Cut, rank: int) -> bytes:
    """What torch.distributed.checkpoint gathers of a rank before it writes."""
    items = []
    for name, (offset, length, _) in found.rows(rank).items():
        chunk = ChunkStorageMetadata(offsets=torch.Size([offset]), sizes=torch.Size([length]))
        data = TensorWriteData(chunk=chunk, properties=TensorProperties(dtype=torch.float32), size=torch.Size([found.sizes[name]]))
        items.append(WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data))
    return pickle.dumps(items)


def read(data: bytes) -> object:
    """What every rank does with an index."""
    index = storage.parse_json("index.json", data)
    digest(index)
    return catalogue("step", index)


def measured(function: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a CPU, and bytes of memory at the highest above those before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _resident("VmHWM"), time.process_time()
    kept = function()
    seconds, most = time.process_time() - began, _resident("VmHWM")
    del kept
    return seconds, most - before


def _resident(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(which)).split()[1])


def _main(preset: str, ranks: int) -> None:
    found = cut(preset, ranks)
    print(f"{preset}, flat stage 3, {ranks} ranks: {len(found.sizes)} tensors, {sum(found.sizes.values()):,} elements")
    index, told = newer_index(found, sorted({0, 1, ranks // 2, ranks - 1}))
    data, part = written(index), newer_part(found, 0)
    seconds, memory = measured(lambda: read(data))
    print(f"index: {len(data) / 1e6:.2f} MB, a part {len(part) / 1e6:.2f} MB; read and checked in {seconds:.2f} s, {memory / 1e6:.0f} MB of memory")
    seconds, memory = measured(lambda: storage.parse_json("rank-0.json", part))
    print(f"part parsed in {seconds:.3f} s, {memory / 1e6:.0f} MB")
    print(f"told at a save: {len(layout.Expected.of(found.rows(0))):,} bytes by the main rank, {[len(words) for words in told]} by others")
    few = replace(found, sizes=dict(list(found.sizes.items())[::_SHARE]))
    times = len(found.sizes) / len(few.sizes)
    data = written(older_index(few))
    seconds, memory = measured(lambda: read(data))
    print(f"older index: {times * len(data) / 1e6:,.0f} MB, read and checked in {times * seconds:.0f} s, {times * memory / 1e9:.1f} GB of memory")
    print(f"told at a save: {len(older_items(found, 0)) / 1e6:.2f} MB by each rank, {ranks * len(older_items(found, 0)) / 1e6:,.0f} MB at one")


if __name__ == "__main__":
    _main((sys.argv[1:2] or ["12B"])[0], int((sys.argv[2:3] or ["1024"])[0]))
