"""Training and encoding of the dVAE, compared with the matrix rate of the same run and with the released package. ``python -m train.bench.dvae``"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import DVAEConfig
from model.dvae import DVAE, logit_laplace_nll, loss, map_pixels
from model.dvae_flops import encoder_flops, train_flops
from model.relaxation import GumbelNoise
from train.bench.harness import Result, main, start
from train.machine.rates import DTYPES, Figure, Options, matmul_rate, measure, threads

_SIZES = {
    "cpu": (DVAEConfig(image_size=64, width=64, vocab=2048), 8),
    "cuda": (DVAEConfig(), 16),
}
"""Device -> configuration and batch. On a CPU, the released network with a quarter of its width, on small pictures."""
_TAU, _BETA, _SEED = 0.5, 6.6, 0
Work = Callable[[], object]


def run(options: Options) -> Result:
    """Measure images/s of training steps and of encoding for each dtype; on a CPU in one thread."""
    cfg, batch = _SIZES[options.device]
    return compare(cfg, batch, options)


def compare(cfg: DVAEConfig, batch: int, options: Options) -> Result:
    """See run."""
    flops = {"training": train_flops(cfg), "encoding": encoder_flops(cfg)}
    sizes: dict[str, Any] = {"image_size": cfg.image_size, "width": cfg.width, "vocab": cfg.vocab, "groups": cfg.groups}
    sizes |= {"blocks_per_group": cfg.blocks_per_group, "batch": batch, "threads": 1}
    sizes |= {f"gflop_per_image_{name}": round(value / 1e9, 3) for name, value in flops.items()}
    result = start("dvae", "dVAE: training step and encoding", options, **sizes)
    package = _released(cfg, options.device)
    with threads(1):
        for dtype in ("fp32", "bf16"):
            result.floor[f"matmul {dtype}"] = matmul_rate(DTYPES[dtype], options)
            ours = {
                "training": training_step(cfg, batch, DTYPES[dtype], options.device),
                "encoding": encoding(cfg, batch, DTYPES[dtype], options.device),
            }
            for name, work in ours.items():
                _one(result, f"{name} {dtype}", work, batch, flops[name], options)
                goal = {"training": 0.40, "encoding": 0.45}[name] if options.device == "cuda" and dtype == "bf16" else None
                result.ratio(f"{name}, share of the matrix rate, {dtype}", f"useful arithmetic, {name} {dtype}", f"matmul {dtype}", goal)
        if package is None:
            result.notes.append("The package dall-e is not installed: nothing to compare with (requirements-dev.txt).")
        else:
            _peers(result, package, cfg, batch, options)
    result.notes.append(
        "Useful arithmetic: products of the convolutions, forward and backward; what is computed again in the backward pass does not count."
    )
    return result


def _peers(result: Result, package: tuple[Any, Any], cfg: DVAEConfig, batch: int, options: Options) -> None:
    theirs = {"training": plain_step(*package, cfg, batch, options.device), "encoding": plain_encoding(package[0], cfg, batch, options.device)}
    for name, work in theirs.items():
        result.peers[f"dall-e 0.1, {name}"] = measure(work, batch, "images/s", options)
        for dtype in ("fp32", "bf16"):
            goal = 2.0 if options.device == "cpu" and dtype == "bf16" else None
            result.ratio(f"{name} {dtype} over dall-e 0.1", f"{name} {dtype}", f"dall-e 0.1, {name}", goal)
    result.notes.append(
        "dall-e 0.1 runs as its modules come: fp32 on a CPU, fp16 products on a GPU; training adds the logit-Laplace ELB, torch's gumbel_softmax and AdamW."
    )


def _one(result: Result, name: str, work: Work, batch: int, flops: float, options: Options) -> None:
    figure = measure(work, batch, "images/s", options)
    result.measured[name] = figure
    per_image = flops / 1e9
    result.measured[f"useful arithmetic, {name}"] = Figure(
        figure.value * per_image, figure.min * per_image, figure.max * per_image, "GFLOP/s", figure.runs
    )


def _pixels(cfg: DVAEConfig, batch: int, device: str) -> Tensor:
    return torch.rand(batch, 3, cfg.image_size, cfg.image_size, generator=torch.Generator().manual_seed(_SEED)).to(device)


def training_step(cfg: DVAEConfig, batch: int, dtype: torch.dtype, device: str) -> Work:
    """A function that does one update on fixed, random pictures."""
    torch.manual_seed(_SEED)
    model = DVAE(cfg, dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    pixels_B3YX = _pixels(cfg, batch, device).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        terms = model(pixels_B3YX, GumbelNoise(range(batch), device), _TAU)
        loss(terms.nll_B, terms.kl_B, _BETA, cfg.downsample).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def encoding(cfg: DVAEConfig, batch: int, dtype: torch.dtype, device: str) -> Work:
    """A function that turns fixed, random pictures into codes."""
    torch.manual_seed(_SEED)
    model = DVAE(cfg, dtype).to(device).eval()
    pixels_B3YX = _pixels(cfg, batch, device).contiguous(memory_format=torch.channels_last)
    return lambda: model.encode(pixels_B3YX)


def _released(cfg: DVAEConfig, device: str) -> tuple[Any, Any] | None:
    """Encoder and decoder of the released package in this size; None if it is not installed.

    Its parameters are trainable by default. Its argument requires_grad is not used: False has no effect, and True raises an error.
    """
    try:
        dall_e = import_module("dall_e")
    except ImportError:
        return None
    common = {"n_hid": cfg.width, "n_blk_per_group": cfg.blocks_per_group, "vocab_size": cfg.vocab}
    return dall_e.Encoder(**common).to(device), dall_e.Decoder(n_init=cfg.init_width, **common).to(device)


def plain_step(encoder: Any, decoder: Any, cfg: DVAEConfig, batch: int, device: str) -> Work:
    """A function that makes one update of the package's modules, written after the paper's formulas with plain torch operations."""
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-4)
    pixels_B3YX = _pixels(cfg, batch, device)

    def step() -> None:
        mapped_B3YX = map_pixels(pixels_B3YX)
        logits_BNYX = encoder(mapped_B3YX)
        mu_B3YX, ln_b_B3YX = decoder(F.gumbel_softmax(logits_BNYX, tau=_TAU, dim=1)).float().chunk(2, dim=1)
        nll_B = logit_laplace_nll(mapped_B3YX, mu_B3YX, ln_b_B3YX).mean((1, 2, 3))
        log_q_BNYX = F.log_softmax(logits_BNYX, dim=1)
        kl_B = (log_q_BNYX.exp() * log_q_BNYX).sum(1).mean((1, 2))  # the constant ln N has no gradient
        loss(nll_B, kl_B, _BETA, cfg.downsample).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def plain_encoding(encoder: Any, cfg: DVAEConfig, batch: int, device: str) -> Work:
    """A function that computes codes with the package's encoder, as its notebook does."""
    pixels_B3YX = _pixels(cfg, batch, device)

    def encode() -> Tensor:
        with torch.no_grad():
            codes_BYX: Tensor = torch.argmax(encoder(map_pixels(pixels_B3YX)), dim=1)
        return codes_BYX

    return encode


if __name__ == "__main__":
    main(run)
