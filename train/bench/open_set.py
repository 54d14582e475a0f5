"""Opening a set of 250 million records: manifest, index and list of excluded records are generated, with no shard behind them, and opened as a training process
does it. ``launcher.py bench open-set``. Needs all dependencies, about 200 MB of disk and a minute."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards import schema
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, open_set
from data_pipeline.shards.versions import Part, merge
from infra.repository import REPOSITORY
from infra.world import World
from train.bench.harness import Result, main, start
from train.machine.rates import Figure, Options

RECORDS = 250_000_000
GOAL_S, GOAL_BYTES = 60.0, 2e9
_RANKS = 8
_A_SHARD, _SHARDS_A_PART, _IMAGE_BYTES = 2_100, 5, 31_000
"""Records of a shard file of 64 MiB, and shard files of a part: pictures of 31 kB."""
_HIDDEN = 100
"""One of so many records is excluded, as a duplicate."""


def run(options: Options) -> Result:
    """Generate the set and open it in fresh processes."""
    return measured(options, RECORDS)


def measured(options: Options, records: int) -> Result:
    """The same of a set of so many records."""
    with tempfile.TemporaryDirectory() as folder:
        made = generate(folder, records)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and "versions" in path.parts]
        size = sum(path.stat().st_size for path in files)
        result = start(
            "open-set",
            "Opening a set of 250 million records",
            options,
            records=records,
            parts=len(made.parts),
            megabytes_of_indexes=round(size / 1e6, 1),
        )
        began = time.perf_counter()
        for path in files:
            path.read_bytes()
        result.floor["reading the same bytes"] = _once(time.perf_counter() - began, "s")
        found = [_child(folder, made.content_hash) for _ in range(min(3, options.runs))]
    for name, unit, scale in (("seconds", "s", 1.0), ("memory", "GB", 1e-9), ("before", "GB", 1e-9)):
        values = sorted(each[name] * scale for each in found)
        words = {"seconds": "opening", "memory": "memory of a process", "before": "of that, imports"}[name]
        result.measured[words] = Figure(values[len(values) // 2], values[0], values[-1], unit, len(values))
    of_a_node = _RANKS * (result.measured["memory of a process"].value - result.measured["of that, imports"].value)
    result.measured[f"memory of {_RANKS} processes, without imports"] = _once(of_a_node, "GB")
    result.measured["time allowed"], result.measured["memory allowed"] = _once(GOAL_S, "s"), _once(GOAL_BYTES / 1e9, "GB")
    result.ratio("time allowed over opening", "time allowed", "opening", goal=1.0)
    result.ratio("memory allowed over that of a node", "memory allowed", f"memory of {_RANKS} processes, without imports", goal=1.0)
    result.notes += [
        "Opening: manifest, index and excluded records are read and checked, the loader is made, and the first epoch's order of shards with its first block of samples. "
        "No caption and no picture is read. A process is one rank without workers; memory is the largest resident size.",
    ]
    return result


def generate(folder: str, records: int) -> ShardSet:
    """Write a set's manifest, index and list of excluded records."""
    a_part = _A_SHARD * _SHARDS_A_PART
    sizes = [min(a_part, records - begin) for begin in range(0, records, a_part)]
    parts = [Part(f"{number:016x}", "made up") for number in range(len(sizes))]
    markers = [_marker(number, size) for number, size in enumerate(sizes)]
    return merge(folder, parts, markers, IMAGE_SCHEMA, {}, excluded=np.arange(0, records, _HIDDEN))


def _marker(number: int, size: int) -> dict[str, Any]:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    names = ["captions.jsonl.gz", "ids.u64", "index.json", "prints.u64", *(f"shard.{shard:05d}.mds" for shard in range(-(-size // _A_SHARD)))]
    files = [{"name": name, "bytes": _A_SHARD * _IMAGE_BYTES, "sha256": digest} for name in names]
    shards = [_entry(shard, min(_A_SHARD, size - shard * _A_SHARD), digest) for shard in range(-(-size // _A_SHARD))]
    return {"count": size, "files": files, "shards": shards}


def _entry(shard: int, samples: int, digest: str) -> dict[str, Any]:
    names = sorted(schema.IMAGE_COLUMNS)
    raw = {"basename": f"shard.{shard:05d}.mds", "bytes": samples * _IMAGE_BYTES, "hashes": {"xxh64": digest[:16]}}
    encodings = [schema.IMAGE_COLUMNS[name] for name in names]
    common = {"column_names": names, "column_encodings": encodings, "column_sizes": [None] * len(names), "compression": None, "format": "mds"}
    return common | {"hashes": ["xxh64"], "raw_data": raw, "samples": samples, "size_limit": 1 << 26, "version": 2, "zip_data": None}


def opened(url: str, version: str) -> dict[str, float]:
    """Open a set as a training process does; seconds, and bytes of this process at their most, and before."""
    from data_pipeline.loading.loaders import ShardLoader

    before = _most_bytes()
    began = time.perf_counter()
    shard_set = open_set(url, IMAGE_SCHEMA, version=version)
    loader: ShardLoader[Any, Any] = ShardLoader([shard_set], url, World.single(), 512, 0, lambda record, epoch: record, lambda samples: samples)
    order = loader._endless.epoch(0)
    first = next(iter(loader._endless.every(0, 0, 512, 0, 1)))
    assert order.stored == shard_set.stored and len(first[1].T)
    return {"seconds": time.perf_counter() - began, "memory": _most_bytes(), "before": before}


def _most_bytes() -> int:
    """The largest resident size of this process. Not getrusage's, which begins with that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _child(url: str, version: str) -> dict[str, float]:
    code = f"import json, train.bench.open_set as bench; print(json.dumps(bench.opened({url!r}, {version!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _once(value: float, unit: str) -> Figure:
    return Figure(value, value, value, unit, 1)


if __name__ == "__main__":
    main(run)
