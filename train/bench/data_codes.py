"""The loader of codes: records/s of a worker, its memory, and how long the demo's transformer waits for it. ``python -m train.bench.data_codes``"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.loaders import ShardLoader, code_collate
from data_pipeline.loading.transforms import Record, Sample, code_transform
from data_pipeline.shards.shard_set import CODES_SCHEMA, CodeRecord, ShardSet
from data_pipeline.shards.versions import write_set
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from infra.seeds import derive
from infra.world import World
from model.config import StreamShape, TransformerConfig
from train.bench.harness import Result, main, start
from train.bench.training_step import training_step
from train.machine.rates import Figure, Options, measure, threads

RECORDS = 20_000
GRID = 32
BATCH = 256
_DEMO_SHAPE = StreamShape(text_tokens=40, text_vocab=2048, grid=16, image_vocab=512)
_WORDS = (
    "a an the of in on with and red green blue old small large man woman dog cat house tree street table photograph painting standing sitting next "
    "to behind under over water mountain sky window city beach food plate horse riding bicycle people group train station building white black"
)


def run(options: Options) -> Result:
    """Measure records/s of one worker, the rate at which the same bytes can be read, memory, and the fraction of a training step that is spent waiting."""
    result = start("data-codes", "Code loader", options, records=RECORDS, grid=GRID, batch=BATCH, caption_words="5 to 25", captions=3)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        shard_set = make_set(folder)
        model = train_tokenizer((caption for record in shard_set.records() for caption in record["captions"]), 2048)
        tokenizer = Tokenizer(model, 256)
        figure = measure(lambda: _read_bytes(shard_set), RECORDS, "records/s", options)
        result.floor["reading the same bytes"] = figure
        for name, transform in (
            ("untokenised", untokenised(0)),
            ("tokenised", code_transform(tokenizer, 0)),
            ("tokenised with BPE dropout", code_transform(tokenizer, 0, dropout=0.1)),
        ):
            collate = code_collate if name.startswith("tokenised") else codes_collate
            result.measured[name] = _rate(shard_set, transform, collate, options)
            result.ratio(f"{name} over its floor", name, "reading the same bytes")
        result.measured["untokenised, through a worker process"] = _rate(shard_set, untokenised(0), codes_collate, options, workers=1)
        _memory(result, shard_set, code_transform(tokenizer, 0, dropout=0.1))
    with tempfile.TemporaryDirectory() as folder, threads(1):
        _waiting(result, make_set(folder, 4000, _DEMO_SHAPE.grid), Tokenizer(model, _DEMO_SHAPE.text_tokens), options)
    result.notes.append(
        f"Goal: at least 20,000 records/s untokenised ({'met' if result.measured['untokenised'].value >= 20_000 else 'missed'}). One worker's work is "
        "measured in the calling thread; a worker process then hands its batches over. Waiting is measured with the demo's transformer and shapes."
    )
    return result


def make_set(folder: str, records: int = RECORDS, grid: int = GRID) -> ShardSet:
    """Generate a code set with three captions in each record."""
    rng, words = np.random.default_rng(0), _WORDS.split()

    def record(number: int) -> CodeRecord:
        captions = [" ".join(rng.choice(words, rng.integers(5, 26))) for _ in range(3)]
        crop = {"box": [0, 0, 300, 300], "resize": 256, "offset": [3, 5], "flip": False}
        return CodeRecord(f"train/{number:09}", captions, rng.integers(0, 8192, grid * grid).astype(np.uint16), crop, 0, 1)

    return write_set(folder, [map(record, range(records))], CODES_SCHEMA, shard_bytes=1 << 24)


def untokenised(seed: int) -> Callable[[Record, int], Sample]:
    """A transform that returns the codes, and the chosen caption as text."""

    def transform(record: Record, epoch: int) -> Sample:
        captions = record["captions"]
        caption = captions[derive(seed, "caption", epoch, record["id"]) % len(captions)]
        return {"id": record["id"], "caption": caption, "codes": record["codes"]}

    return transform


def codes_collate(samples: list[Sample]) -> dict[str, Any]:
    """Collate samples to ids, captions, and codes uint16 [B, I]."""
    codes_BI = torch.from_numpy(np.stack([sample["codes"] for sample in samples]))
    return {"ids": [sample["id"] for sample in samples], "captions": [sample["caption"] for sample in samples], "codes": codes_BI}


def _read_bytes(shard_set: ShardSet) -> None:
    for shard in shard_set.shards:
        with open(Path(shard_set.url, shard.basename), "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


@contextlib.contextmanager
def _loader(shard_set: ShardSet, transform: Callable[[Record, int], Sample], collate: Callable[..., Any], workers: int, batch: int) -> Iterator[Any]:
    with _one_rank():
        loader = ShardLoader([shard_set], "", World.single(), batch, 0, transform, collate, workers=workers)
    try:
        yield loader
    finally:
        loader.close()


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Act as a single rank inside the block, whatever environment variables the process was started with."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= kept


def _rate(shard_set: ShardSet, transform: Callable[[Record, int], Sample], collate: Callable[..., Any], options: Options, workers: int = 0) -> Figure:
    with _loader(shard_set, transform, collate, workers, BATCH) as loader:
        return measure(loader.next, BATCH, "records/s", options)


def _memory(result: Result, shard_set: ShardSet, transform: Callable[[Record, int], Sample]) -> None:
    """Measure the private memory of a worker: pages that it shares with its parent do not count."""
    with _loader(shard_set, transform, code_collate, 1, BATCH) as loader:
        for _ in range(RECORDS // BATCH):
            loader.next()
        lines = Path(f"/proc/{loader.worker_pids[0]}/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024
    result.measured["memory of a worker"] = Figure(own, own, own, "MiB", 1)


def _waiting(result: Result, shard_set: ShardSet, tokenizer: Tokenizer, options: Options) -> None:
    """Measure the fraction of a step that the demo's transformer waits for a batch."""
    batch, transform = 16, code_transform(tokenizer, 0, dropout=0.1)
    step = training_step(TransformerConfig(layers=4, width=128, heads=4), _DEMO_SHAPE, batch, "fp32", options.device, "structured")
    shares, rates = [], []
    for workers in (0, 1):
        with _loader(shard_set, transform, code_collate, workers, batch) as loader:
            for _ in range(3):
                loader.next()
                step()
            waited, began, steps = 0.0, time.perf_counter(), 0
            while steps < 5 or time.perf_counter() - began < options.seconds:
                before = time.perf_counter()
                loader.next()
                waited += time.perf_counter() - before
                step()
                steps += 1
            total = time.perf_counter() - began
        shares.append(100 * waited / total)
        rates.append(batch * steps / total)
    for workers, share in enumerate(shares):
        result.measured[f"waiting, share of a step, {workers} workers"] = Figure(share, share, share, "%", 1)
    result.measured["demo transformer"] = Figure(rates[1], rates[1], rates[1], "samples/s", 1)
    result.ratio("tokenised loader over the demo's transformer", "tokenised with BPE dropout", "demo transformer", goal=10.0)


if __name__ == "__main__":
    main(run)
