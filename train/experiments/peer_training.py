"""Trains dalle-pytorch on our batches of codes for a given time, with settings that are good for it: the peer's half of train/experiments/peer.py.

Probes, which do not count as training time, choose fp32 or bf16 autocast, whichever makes more updates; and then its learning rate, and its attention pattern if
several are given, by the validation loss after a short training with the complete schedule. It also gets our order of samples, AdamW with our weight decays, our
warm-up and cosine schedule, and the allocator setting that our stages use.

B batch, T text positions, I image positions, C channels of its logits: text ids, padding ids of positions, image codes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.run_folder import RunFolder, producer
from infra.seeds import derive
from infra.world import World
from model.config import StreamShape
from train.bench import peer_dalle
from train.config import RunConfig
from train.engines.replicated import decay_groups
from train.loop.trainer import Batch, Loader
from train.machine.rates import DTYPES, Options, measure, threads
from train.run.data_inputs import open_tokenizer
from train.stages import dalle_batches
from train.stages.dalle_task import cross_entropies

ATTENTIONS = ("full", "axial")
RATES = (3e-4, 1e-3, 3e-3, 6e-3)
"""Peak learning rates to choose from; the first is that of its train_dalle.py."""
CLIP_NORM = 0.5
"""The value of its train_dalle.py."""
WARMUP = 0.05
"""The fraction of the training that is warm-up, in both halves."""
EVALUATIONS = 12
"""Number of points of a curve, in both halves."""
_RATE_S = 10.0
_CPU = torch.device("cpu")

Point = tuple[float, int, float]
"""Minutes of training, updates, validation nats per image code."""


@dataclass(frozen=True)
class Choice:
    """The settings with which the peer is trained."""

    attention: str
    precision: str
    lr: float


def layers_of(attention: str, layers: int) -> tuple[str, ...]:
    """The kinds of its attention layers for an entry of ATTENTIONS."""
    return ("full",) if attention == "full" else peer_dalle.attention_pattern(layers)


def its_text(text_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """Convert our caption ids to its form: the same ids, but 0 where there is no token. It replaces 0 by the padding id of the position."""
    return text_BT.where(torch.arange(text_BT.shape[1]) < lengths_B[:, None], 0)


class Peer:
    """Its model with the interface of ours."""

    def __init__(self, cfg: RunConfig, choice: Choice) -> None:
        torch.manual_seed(derive(cfg.run.seed, "init"))
        self.shape: StreamShape = cfg.stream_shape()
        self.dtype = DTYPES[choice.precision]
        self.model = peer_dalle.build(cfg.dalle, self.shape, layers_of(choice.attention, cfg.dalle.layers), text_ids=self.shape.text_vocab)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, batch: Batch) -> Tensor:
        """Its training loss with its weights (1/8 text, 7/8 image; padding counts as text)."""
        with self._arithmetic():
            total: Tensor = self.model(its_text(batch["text"], batch["lengths"]), batch["codes"], return_loss=True)
        return total

    def losses(self, text_BT: Tensor, lengths_B: Tensor, codes_BI: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood of each token in nats, fp32 [B, T] and [B, I], as our transformer computes it: image codes are normalised over image codes, text ids
        over text ids and padding ids; 0 where there is no text token."""
        text_BT, ids = its_text(text_BT, lengths_B), self.model.num_text_tokens
        with self._arithmetic():
            logits_BSC = self.model(text_BT, codes_BI).float()
        text_BTC, image_BIC = logits_BSC.split([self.shape.text_tokens, self.shape.image_tokens], dim=1)
        text_nll_BT = F.cross_entropy(text_BTC[..., :ids].transpose(1, 2), text_BT, reduction="none").where(text_BT != 0, 0.0)
        return text_nll_BT, F.cross_entropy(image_BIC[..., ids:].transpose(1, 2), codes_BI, reduction="none")

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def step_size(share: float, peak: float) -> float:
    """The learning rate after a fraction of the training time: linear warm-up, then half a cosine that reaches zero at the end."""
    if share < WARMUP:
        return peak * max(share, 1e-3) / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - WARMUP) / (1 - WARMUP))))


def train(
    peer: Peer, loader: Loader, cfg: RunConfig, minutes: float, lr: float, evaluate: Callable[[], float], evaluations: int = EVALUATIONS
) -> list[Point]:
    """Train for ``minutes``, and evaluate at even distances and at the end. The loading of batches counts as time, evaluations do not."""
    fit = cfg.dalle_fit
    named = [(name, p) for name, p in peer.model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decay_groups(named, fit.weight_decay), lr=0.0, betas=(fit.beta1, fit.beta2), fused=True)
    points: list[Point] = []
    budget_s, spent_s, updates = 60 * minutes, 0.0, 0
    while spent_s < budget_s:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = step_size(spent_s / budget_s, lr)
        peer.loss(loader.next()).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        spent_s += time.perf_counter() - began
        if spent_s >= min(1.0, (len(points) + 1) / evaluations) * budget_s:
            points.append((spent_s / 60, updates, evaluate()))
            print(f"dalle-pytorch: {points[-1][0]:.1f} of {minutes:g} minutes, {updates} updates, {points[-1][2]:.4f} nats per code", flush=True)
    return points


def update_rates(cfg: RunConfig, attention: str) -> dict[str, float]:
    """Precision -> updates/s on random data. The best of several runs, because other load on the machine can only make updates slower."""
    found = {}
    for name in ("fp32", "bf16"):
        kinds = layers_of(attention, cfg.dalle.layers)
        update = peer_dalle.training_step(cfg.dalle, cfg.stream_shape(), cfg.dalle_fit.batch, DTYPES[name], "cpu", kinds)
        found[name] = measure(update, 1, "updates/s", Options("cpu", seconds=_RATE_S, runs=5)).max
    return found


def best(tried: Iterable[tuple[Choice, float]]) -> Choice:
    """The choice with the lowest loss. One that diverged is chosen only if all have."""
    return min(tried, key=lambda item: item[1] if math.isfinite(item[1]) else math.inf)[0]


def run(cfg: RunConfig, run: RunFolder, minutes: float, probe_minutes: float, cores: int, attentions: Iterable[str]) -> dict[str, Any]:
    """Choose the settings, train for ``minutes``, and evaluate on our validation samples.

    Raises:
        ValueError: it is not installed.
    """
    tokenizer, _ = open_tokenizer(cfg, run)
    world, fit = World.single(), cfg.dalle_fit

    def trained(choice: Choice, minutes: float, evaluations: int) -> tuple[Peer, list[Point]]:
        peer, reader = Peer(cfg, choice), dalle_batches.validation(cfg, run, world, tokenizer, fit.eval_samples)
        loader = dalle_batches.training(cfg, run, world, tokenizer, fit.batch)
        return peer, train(peer, loader, cfg, minutes, choice.lr, lambda: figures(peer, reader)["nats_per_code"], evaluations)

    load = [os.getloadavg()[0]]
    with threads(cores):
        rates = {attention: update_rates(cfg, attention) for attention in attentions}
        choices = [Choice(name, max(found, key=lambda key: found[key]), lr) for name, found in rates.items() for lr in RATES]
        tried = [(choice, trained(choice, probe_minutes, 1)[1][-1][2]) for choice in choices]
        chosen = best(tried)
        peer, curve = trained(chosen, minutes, EVALUATIONS)
        final = figures(peer, dalle_batches.validation(cfg, run, world, tokenizer, cfg.evaluate.samples))
    return {
        "minutes": curve[-1][0],
        "updates": curve[-1][1],
        "parameters": sum(p.numel() for p in peer.parameters),
        "curve": curve,
        "final": {"raw": final},
        "recipe": asdict(chosen) | {"clip_norm": CLIP_NORM, "processes": 1},
        "probes": [asdict(choice) | {"minutes": probe_minutes, "nats_per_code": value} for choice, value in tried],
        "updates_per_s": rates,
        "load": [*load, os.getloadavg()[0]],
        "producer": producer() | {"dalle_pytorch": version()},
    }


def figures(peer: Peer, reader: Iterable[Batch]) -> dict[str, float]:
    """The figures that the experiment reports of a model; see ``report_of``."""
    return report_of(cross_entropies(peer.losses, reader, _CPU, lambda lengths_B: lengths_B))


def report_of(measured: dict[str, float]) -> dict[str, float]:
    """Select the cross-entropies that both halves report, in nats."""
    return {"nats_per_code": measured["loss_image"], "nats_shuffled": measured["loss_image_shuffled"], "caption_gain": measured["caption_gain"]}


def version() -> str:
    """The version of the installed package."""
    found = peer_dalle.find("dalle_pytorch")
    named = metadata.distributions(name="dalle-pytorch", path=[str(found)]) if found else ()
    return next((each.version for each in named), "unknown")
