"""One process of the probe for the demo's projection: measures updates of the real networks with the real engines, collectives included, on random data."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from infra import environment
from infra.world import World
from model.dvae import DVAE, loss
from model.relaxation import GumbelNoise
from train.config import RunConfig, load_run
from train.engines.protocol import Engine
from train.engines.replicated import ReplicatedEngine
from train.loop.goodput import process_age_s
from train.machine.attention_choice import choose
from train.machine.rates import probe
from train.ranks.device import BF16_WORTH_IT, keep_memory
from train.ranks.signal_vector import SignalVector
from train.run.inputs import build_dalle

if TYPE_CHECKING:
    from train.engines.zero.engine import ZeroEngine

_CPU = torch.device("cpu")
_TIMEOUT = timedelta(minutes=2)  # short, so that a process that has failed is noticed soon


def dvae_update(cfg: RunConfig, dtype: torch.dtype, world: World) -> Callable[[], None]:
    """An update of the dVAE on this process's share of a batch."""
    fit, size = cfg.dvae_fit, cfg.dvae.image_size
    clip = math.inf if fit.clip_norm is None else fit.clip_norm
    engine = ReplicatedEngine(DVAE(cfg.dvae, dtype), world, betas=(0.9, 0.999), weight_decay=fit.weight_decay, ema=fit.ema, clip_norm=clip)
    count = max(1, fit.batch // (world.size * fit.accumulation))
    pixels_B3YX = torch.rand(count, 3, size, size).contiguous(memory_format=torch.channels_last)

    def micro_batch() -> torch.Tensor:
        terms = engine(pixels_B3YX, GumbelNoise(range(count)), 0.5)
        return loss(terms.nll_B, terms.kl_B, fit.beta, cfg.dvae.downsample) / (world.size * fit.accumulation)

    return _update(engine, micro_batch, fit.accumulation)


def dalle_update(cfg: RunConfig, dtype: torch.dtype, world: World) -> Callable[[], None]:
    """An update of the transformer on this process's share of a batch."""
    engine, micro_batch = transformer(cfg, dtype, world, _CPU)
    return _update(engine, micro_batch, cfg.dalle_fit.accumulation)


def transformer(cfg: RunConfig, dtype: torch.dtype, world: World, device: torch.device) -> tuple[ZeroEngine, Callable[[], torch.Tensor]]:
    """The transformer's engine, and a function that computes the loss of a random micro-batch of this process."""
    from train.engines.zero.engine import ZeroEngine  # imported here, because the import of DeepSpeed takes seconds

    shape, fit = cfg.stream_shape(), cfg.dalle_fit
    attention = choose(cfg.dalle, cfg.stream_shape(), device, dtype, fit.attention_records)
    model = build_dalle(cfg, device, dtype, attention, checkpoint_every=fit.checkpoint_every if fit.activation_checkpointing else 0)
    engine = ZeroEngine(model, fit, cfg.zero, world, cfg.scales)
    count = max(1, fit.batch // (world.size * fit.accumulation))
    text_BT = torch.randint(shape.text_vocab, (count, shape.text_tokens), device=device)
    lengths_B = torch.full((count,), shape.text_tokens, device=device)
    codes_BI = torch.randint(shape.image_vocab, (count, shape.image_tokens), device=device)

    def micro_batch() -> torch.Tensor:
        text_nll_BT, image_nll_BI = engine(text_BT, lengths_B, codes_BI)
        share: torch.Tensor = (text_nll_BT.mean() / 8 + image_nll_BI.mean() * 7 / 8) / (world.size * fit.accumulation)
        return share

    return engine, micro_batch


def _update(engine: Engine, micro_batch: Callable[[], torch.Tensor], accumulation: int) -> Callable[[], None]:
    """A function that does what train/loop/trainer.py does in an update, without data and files."""
    vector = SignalVector((), _CPU)

    def update() -> None:
        for index in range(accumulation):
            engine.micro_batch(last=index == accumulation - 1)
            engine.backward(micro_batch())
        vector.exchange({"stop": 0.0})
        engine.step(0.0)

    return update


def rate(update: Callable[[], None], seconds: float) -> float:
    """Updates/s, measured over about ``seconds`` with the same number of updates in all processes."""
    update()
    go_on, count, started = torch.ones(()), 0, time.perf_counter()
    while go_on:
        update()
        count += 1
        go_on.fill_(float(time.perf_counter() - started < seconds))
        dist.broadcast(go_on, 0)
    return count / (time.perf_counter() - started)


def main(config_url: str, scratch: str, seconds: float, stages: list[str]) -> None:
    """Print as JSON the samples/s of all processes for each stage, and the seconds that this process took before its first update."""
    keep_memory()
    cfg, world = load_run(config_url, []), World.from_env()
    torch.set_num_threads(environment.threads(1))
    store = dist.FileStore(str(Path(scratch, "store")), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT)
    rates = probe(1.0)
    dtype = torch.bfloat16 if rates["bf16"] > BF16_WORTH_IT * rates["fp32"] else torch.float32
    found: dict[str, float] = {}
    spent, began = time.process_time(), time.perf_counter()
    for stage in stages:
        update = (dvae_update if stage == "dvae" else dalle_update)(cfg, dtype, world)
        found.setdefault("start_s", process_age_s())
        found[stage] = rate(update, seconds) * (cfg.dvae_fit if stage == "dvae" else cfg.dalle_fit).batch
    found["cpu_share"] = (time.process_time() - spent) / (time.perf_counter() - began) / torch.get_num_threads()
    print(json.dumps(found), flush=True)
    dist.barrier()  # a process that ended earlier would break the connections of the others


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:])
    os._exit(
        0
    )  # gloo's thread frees the tensors of the last collective. If it needs the GIL while the interpreter ends, the process aborts (one time in ten)
