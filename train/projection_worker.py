"""One process of the probe behind the demo's projection: updates of the real networks on random data, without communication."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

from model.dvae import DVAE, loss
from model.relaxation import GumbelNoise
from train.bench.harness import probe
from train.config import RunConfig, load_run
from train.device import BF16_WORTH_IT, keep_memory
from train.lineage import build_dalle


def dvae_update(cfg: RunConfig, dtype: torch.dtype, batch: int) -> Callable[[], None]:
    """An update of the dVAE on ``batch`` images."""
    model = DVAE(cfg.dvae, dtype)
    size = cfg.dvae.image_size
    pixels_B3YX = torch.rand(batch, 3, size, size).contiguous(memory_format=torch.channels_last)

    def forward() -> torch.Tensor:
        terms = model(pixels_B3YX, GumbelNoise(range(batch)), 0.5)
        return loss(terms.nll_B, terms.kl_B, cfg.dvae_fit.beta, cfg.dvae.downsample)

    return _update(model, forward)


def dalle_update(cfg: RunConfig, dtype: torch.dtype, batch: int) -> Callable[[], None]:
    """An update of the transformer on ``batch`` samples."""
    shape, fit = cfg.stream_shape(), cfg.dalle_fit
    model = build_dalle(cfg, torch.device("cpu"), dtype, checkpoint_every=fit.checkpoint_every if fit.activation_checkpointing else 0)
    text_BT = torch.randint(shape.text_vocab, (batch, shape.text_tokens))
    lengths_B = torch.full((batch,), shape.text_tokens)
    codes_BI = torch.randint(shape.image_vocab, (batch, shape.image_tokens))

    def forward() -> torch.Tensor:
        text_nll_BT, image_nll_BI = model(text_BT, lengths_B, codes_BI)
        return text_nll_BT.mean() + image_nll_BI.mean()

    return _update(model, forward)


def _update(model: nn.Module, forward: Callable[[], torch.Tensor]) -> Callable[[], None]:
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def update() -> None:
        forward().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    return update


def main(config_url: str, nproc: int, seconds: float, stages: list[str]) -> None:
    """Print samples per second of this process for each stage."""
    keep_memory()
    cfg = load_run(config_url, [])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rates = probe(1.0)
    dtype = torch.bfloat16 if rates["bf16"] > BF16_WORTH_IT * rates["fp32"] else torch.float32
    for stage in stages:
        fit = cfg.dvae_fit if stage == "dvae" else cfg.dalle_fit
        batch = max(1, fit.batch // (nproc * fit.accumulation))
        update = (dvae_update if stage == "dvae" else dalle_update)(cfg, dtype, batch)
        update()
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            update()
            count += 1
        print(count * batch / (time.perf_counter() - started))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
