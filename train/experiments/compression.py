"""Measures how much training loss gradient compression between machines costs, on real codes: ``python -m train.experiments.compression RUN --name NAME``.

RUN is a run whose stages tokenizer and encode are finished. The machines are simulated in one process. Each has its part of the batch, its gradient and its error
buffers, and every matrix is divided into as many shards as a machine has GPUs, as in the engine (train/engines/zero/compression). Sums are exact and factors are fp32,
so arms differ only in the algorithm. The arms are: exact; several total ranks, as fractions of the width; and at one rank also a warm start instead of the fixed Q,
Gram-Schmidt instead of Householder, and a Q that is refreshed from the errors. All arms of a seed have the same initial weights and batches. The file is written after
each training, and the same command continues from it; ``--arms`` selects some of the arms.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra import stored
from infra.errors import in_a_sentence
from infra.files import atomic
from infra.repository import DOCS
from infra.run_folder import RunFolder, producer
from infra.seeds import derive
from infra.world import World
from model.transformer import Transformer, parameter_tags
from train.config import RunConfig, load_run
from train.engines.zero.compression import low_rank
from train.engines.zero.compression.fragments import Block, block_of
from train.experiments import compression_page
from train.loop.schedules import warmup_cosine
from train.optimizer.adamw import PaperAdamW
from train.run.data_inputs import open_tokenizer
from train.run.inputs import build_dalle
from train.stages import dalle_batches

_CPU = torch.device("cpu")
TENTHS = 10
_OWED_EVERY = 20
"""Updates between looks at what compression owes."""


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    gpus: int = 2
    """GPUs of a machine: the number of shards of a matrix, and the m of the formula."""
    share: float = 0.0
    """Total rank divided by the width; 0: exact."""
    warm: bool = False
    """Whether the Q of an update is the projection of the next update, as in the original PowerSGD."""
    gram_schmidt: bool = False
    refresh: int = 0
    """Updates after which Q is computed anew from the sum of the errors (compression.refresh_every); 0: it is fixed."""

    @property
    def name(self) -> str:
        if not self.share:
            return "exact"
        changed = ", warm start" * self.warm + ", Gram-Schmidt" * self.gram_schmidt + f", refreshed every {self.refresh}" * (self.refresh > 0)
        return f"m {self.gpus}, r/d {self.share:g}{changed}"


SHARES = (0.08, 0.15, 0.25, 0.5)
MAIN = 0.25
ARMS = (
    Arm(),
    *(Arm(2, share) for share in (MAIN, *(share for share in SHARES if share != MAIN))),
    Arm(2, MAIN, warm=True),
    Arm(2, MAIN, gram_schmidt=True),
    Arm(2, MAIN, refresh=50),
    *(Arm(8, share) for share in SHARES),
)
REPEATED = ("exact", Arm(2, MAIN).name)
"""Arms that are trained with every seed; the others only with the first."""


def gram_schmidt(p: Tensor) -> Tensor:
    """Orthonormal columns in fp32, by the classical recursion. It is inaccurate if columns are nearly dependent."""
    columns: list[Tensor] = []
    for index in range(p.shape[-1]):
        column = p[..., index]
        for before in columns:
            column = column - (before * column).sum(-1, keepdim=True) * before
        columns.append(column / (column.norm(dim=-1, keepdim=True) + 1e-8))
    return torch.stack(columns, -1)


class Compressor:
    """Compresses all blocks of one shape, and holds the error buffers of all machines, [machines, n, rows, cols], transposed so that rows <= cols."""

    def __init__(self, arm: Arm, machines: int, blocks: int, shape: tuple[int, int, int], seed: int) -> None:
        rows, cols, rank = shape
        self.count = 1
        self.owed = self.asked = 0.0
        """Squared norms of the sums over machines, of the errors before the last update and of its gradient; in every ``_OWED_EVERY``th update."""
        self.arm, self.errors = arm, torch.zeros(machines, blocks, rows, cols)
        self.q0 = torch.stack([low_rank.gaussian(cols, rank, derive(seed, "compression", "experiment", rows, index)) for index in range(blocks)])

    def __call__(self, gradients: Tensor) -> Tensor:
        """The compressed sum of the gradients, which all machines apply; the rest stays in the error buffers."""
        if self.count % _OWED_EVERY == 0:
            self.owed, self.asked = (float(one.sum(0).square().sum()) for one in (self.errors, gradients))
        self.errors += gradients
        if self.arm.refresh and self.count % self.arm.refresh == 0:
            self.q0 = low_rank.refreshed(self.errors.sum(0), self.q0.shape[-1])
        self.count += 1
        p = torch.stack([low_rank.left(errors, self.q0) for errors in self.errors]).sum(0)
        p = gram_schmidt(p) if self.arm.gram_schmidt else low_rank.orthonormal(p)
        q = torch.stack([low_rank.right(errors, p) for errors in self.errors]).sum(0)
        if self.arm.warm:
            self.q0 = q / q.abs().amax().clamp(min=1e-30)
        applied = low_rank.product(p, q)
        self.errors -= applied / len(self.errors)
        return applied


class Machines:
    """Sums the gradients of all machines, as an arm does it."""

    def __init__(self, model: Transformer, arm: Arm, machines: int, seed: int) -> None:
        self.model, self.arm, self.machines = model, arm, machines
        tags, width = parameter_tags(model), model.cfg.width
        self.rank = max(arm.gpus, round(arm.share * width / arm.gpus) * arm.gpus) if arm.share else 0
        self.places: dict[tuple[int, int, int], list[tuple[str, int, Block]]] = {}
        sent = whole = 0
        for name, p in model.named_parameters():
            if not (self.rank and tags[name].is_block_matrix):
                continue
            length = p.numel() // arm.gpus
            for gpu in range(arm.gpus):
                block = block_of(gpu * length, length, p.numel(), p.shape[1], self.rank)
                whole += length
                if block is None:
                    sent += length
                    continue
                sent += length - block.elements + block.factors
                self.places.setdefault(block.shape, []).append((name, gpu * length + block.start, block))
        self.sent_share = sent / whole if whole else 1.0
        self.compressors = {shape: Compressor(arm, machines, len(places), shape, seed) for shape, places in self.places.items()}

    def owed(self) -> float:
        """What compression has not sent yet, as a norm, over that of what the last gradient asked for (metric ``numerics/owed``)."""
        asked = sum(one.asked for one in self.compressors.values())
        return (sum(one.owed for one in self.compressors.values()) / asked) ** 0.5 if asked else 0.0

    def summed(self, gradients: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The gradient that is applied, computed from those of the machines."""
        total = {name: torch.stack([one[name] for one in gradients]).sum(0) for name in gradients[0]}
        for shape, places in self.places.items():
            stacked = torch.stack([torch.stack([_lying(one[name], start, block) for name, start, block in places]) for one in gradients])
            for (name, start, block), applied in zip(places, self.compressors[shape](stacked), strict=True):
                total[name].view(-1)[start : start + block.elements] = (applied.mT if block.is_upright else applied).reshape(-1)
        return total


def _lying(gradient: Tensor, start: int, block: Block) -> Tensor:
    matrix = gradient.reshape(-1)[start : start + block.elements].view(block.rows, block.width)
    return matrix.mT if block.is_upright else matrix


@dataclass(frozen=True)
class Options:
    """Size of an experiment."""

    updates: int = 600
    machines: int = 2
    lr: float = 3e-3
    warmup: int = 60


def train(cfg: RunConfig, run: RunFolder, arm: Arm, options: Options, seed: int) -> dict[str, Any]:
    """Train once. Returns the mean loss of each tenth of the updates, and the seconds with and without compression."""
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"seed": seed})})
    tokenizer, _ = open_tokenizer(cfg, run)
    loader = dalle_batches.training(cfg, run, World.single(), tokenizer, cfg.dalle_fit.batch)
    torch.manual_seed(derive(seed, "init"))
    model = build_dalle(cfg, _CPU, torch.float32, "structured")
    machines = Machines(model, arm, options.machines, seed)
    tags, fit = parameter_tags(model), cfg.dalle_fit
    groups: Any = [{"params": [p], "weight_decay": fit.weight_decay if tags[name].decays else 0.0} for name, p in model.named_parameters()]
    adam = PaperAdamW(groups, betas=(fit.beta1, fit.beta2), clip_variance=fit.clip_variance)
    losses, owed, began, compressing = [], [], time.perf_counter(), 0.0
    for step in range(options.updates):
        batch = loader.next()
        loss, gradients = _gradients(model, batch, options.machines, cfg.dalle.text_loss_weight)
        losses.append(loss)
        at = time.perf_counter()
        total = machines.summed(gradients)
        compressing += time.perf_counter() - at
        if (step + 1) % _OWED_EVERY == 0:
            owed.append(machines.owed())
        norm = float(torch.stack([one.norm() for one in total.values()]).norm())
        factor = min(1.0, fit.clip_norm / (norm + 1e-6))
        adam.count = step + 1
        for group, (name, p) in zip(adam.param_groups, model.named_parameters(), strict=True):
            group |= {"lr": warmup_cosine(step, options.lr, 0.0, options.warmup, options.updates), "factor": factor}
            p.grad = total[name].view_as(p)
        adam.step()
    each = options.updates // TENTHS
    tenths = [sum(losses[start : start + each]) / each for start in range(0, each * TENTHS, each)]
    seconds = {"seconds": round(time.perf_counter() - began, 1), "compressing_s": round(compressing, 1)}
    return {
        "arm": arm.name,
        "gpus": arm.gpus,
        "rank": machines.rank,
        "seed": seed,
        "sent_share": round(machines.sent_share, 4),
        "tenths": tenths,
        "owed": owed,
    } | seconds


def _gradients(model: Transformer, batch: dict[str, Any], machines: int, text_weight: float) -> tuple[float, list[dict[str, Tensor]]]:
    """The loss of a batch, and the part of its gradient that each machine computes."""
    text, lengths, codes = batch["text"], batch["lengths"], batch["codes"]
    texts, images = float(model.text_counts(lengths).sum().clamp(min=1)), float(codes.numel())
    loss, found = 0.0, []
    for part in torch.arange(len(codes)).chunk(machines):
        model.zero_grad(set_to_none=True)
        text_nll, image_nll = model(text[part], lengths[part], codes[part])
        share = text_weight * text_nll.sum() / texts + (1 - text_weight) * image_nll.sum() / images
        share.backward()
        loss += float(share.detach())
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return loss, found


class _Training(stored.Stored):
    arm: str
    seed: int


class _File(stored.Stored):
    """A file of these trainings."""

    settings: dict[str, Any]
    runs: list[_Training]


def experiment(cfg: RunConfig, run: RunFolder, options: Options, seeds: Sequence[int], arms: Sequence[str], out: Path) -> dict[str, Any]:
    """Train all arms, and write the file after each training. Trainings that ``out`` already holds are not repeated.

    Raises:
        SystemExit: ``out`` holds trainings with other options.
    """
    shape = {"layers": cfg.dalle.layers, "width": cfg.dalle.width, "batch": cfg.dalle_fit.batch, "clip_norm": cfg.dalle_fit.clip_norm}
    settings = json.loads(json.dumps(asdict(options) | shape | {"codes": cfg.stream_shape().image_tokens, "vocab": cfg.dvae.vocab}))
    found: dict[str, Any] = {"kind": "compression", "name": out.stem, "settings": settings, "runs": [], "producer": producer()}
    if out.exists():
        found["runs"] = (before := stored.read(str(out), _File, "repair it, or give another --name"))["runs"]
        if before["settings"] != settings:
            raise SystemExit(f"{out} holds trainings with {before['settings']}: give another --name, or remove it")
    there = {(one["arm"], one["seed"]) for one in found["runs"]}
    for seed in seeds:
        for arm in ARMS:
            if (arm.name, seed) in there or (arms and arm.name not in arms) or (seed != seeds[0] and arm.name not in REPEATED):
                continue
            found["runs"].append(train(cfg, run, arm, options, seed))
            with atomic(out) as file:
                file.write(json.dumps(found, indent=1, sort_keys=True).encode() + b"\n")
            print(f"{arm.name}, seed {seed}: {found['runs'][-1]['tenths'][-1]:.4f} nats", flush=True)
    return found


def main(words: Sequence[str]) -> None:
    """Train the arms and write their file; print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m train.experiments.compression", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="folder of a run with codes")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--name", default="compression", help="name of the JSON file below docs/experiments")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--updates", type=int, default=Options.updates)
    parser.add_argument("--machines", type=int, default=Options.machines)
    parser.add_argument("--lr", type=float, default=Options.lr)
    parser.add_argument("--warmup", type=int, default=Options.warmup)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", default=[], help="names of arms; all if not given")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    cfg = load_run(given.run, given.overrides)
    out = given.docs / "experiments" / f"{given.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    options = Options(given.updates, given.machines, given.lr, given.warmup)
    found = experiment(cfg, RunFolder(given.run), options, given.seeds, given.arms, out)
    print(compression_page.table(found["runs"], cfg.dalle.width))


if __name__ == "__main__":
    in_a_sentence(main)
