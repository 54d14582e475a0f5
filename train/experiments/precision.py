"""Tests the paper's argument for gradient scales with a deep and narrow model that this machine can train: ``python -m train.experiments.precision --name NAME``.

The arms are: fp32; fp16 with one global scale; fp16 with a scale for each resblock; the same with 16-bit moments. For each exponent floor, the figures are the
fraction of each resblock's gradient values that fp16 lost (exactly zero, but not in fp32), and the training losses (paper 2.4, Figures 4 and 12).

The paper observed underflow above a billion parameters. If it does not occur in our smaller model, ``--floors 0 4 8`` raises the exponent floor of fp16 by so many
bits, in all fp16 arms: values below the raised smallest normal number are rounded to multiples of the raised smallest subnormal one. Scales start at the values that
they would have after a long run. DeepSpeed is not used. ``--seeds 0 1 2`` repeats all arms with other initial weights and data. The file is written after each run,
and the same command continues from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from infra import stored
from infra.errors import in_a_sentence
from infra.files import atomic
from infra.repository import DOCS
from infra.run_folder import producer
from model.config import StreamShape, TransformerConfig
from model.transformer import Projection, Transformer, parameter_tags
from train.config import DalleFit, ScaleSection
from train.engines.zero.scales import GradientScales
from train.experiments import precision_page
from train.loop.schedules import warmup
from train.optimizer.adamw import PaperAdamW
from train.optimizer.protocol import ShardGroup
from train.report.plots import thin

SHAPE = StreamShape(text_tokens=8, text_vocab=32, grid=4, image_vocab=32)
_SMALLEST_NORMAL, _SMALLEST = 2.0**-14, 2.0**-24
_POINTS = 200


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    dtype: torch.dtype = torch.float16
    scope: str = "none"
    packed: bool = False


ARMS = (
    Arm("fp32", torch.float32),
    Arm("fp16, global scale", scope="global"),
    Arm("fp16, scale per resblock", scope="resblock"),
    Arm("fp16, scale per resblock, 16-bit moments", scope="resblock", packed=True),
)


@dataclass(frozen=True)
class Options:
    """Size of an experiment."""

    layers: int = 32
    width: int = 32
    updates: int = 1000
    batch: int = 16
    floors: tuple[int, ...] = (0,)
    lr: float = 2e-3
    seed: int = 0
    growth_updates: int = 200
    """Number of updates after which a scale is doubled. The paper's 1000 are for runs of 430,000 updates; with 50, a seventh of all updates was lost to overflows."""
    window: int = 8
    ceiling: int = 44
    """Largest exponent of a scale. The paper's 24 is right for normal fp16; with a raised floor, this limit would hide the effect of the range."""


class _Floor(torch.autograd.Function):
    """The identity, whose gradient is rounded as in an fp16 format with a raised exponent floor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.bits = bits
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return raise_floor(grads[0], ctx.bits), None


def raise_floor(x: Tensor, bits: int) -> Tensor:
    """Round small values as in an fp16 format whose smallest normal and subnormal numbers are 2**bits times larger; larger values stay."""
    step = _SMALLEST * 2.0**bits
    return torch.where(x.abs() < _SMALLEST_NORMAL * 2.0**bits, (x.float() / step).round() * step, x.float()).to(x.dtype)


class Run:
    """The training of one arm at one exponent floor."""

    def __init__(self, arm: Arm, options: Options, floor: int) -> None:
        torch.manual_seed(options.seed)
        cfg = TransformerConfig(layers=options.layers, width=options.width, heads=max(1, options.width // 16), conv_kernel=3)
        self.arm, self.options = arm, options
        self.model = Transformer(cfg, SHAPE, branch_dtype=arm.dtype)
        self.tags = parameter_tags(self.model)
        if arm.dtype == torch.float16 and floor:
            _install_floor(self.model, self.tags, floor)
        rules = ScaleSection(scope=arm.scope, growth_updates=options.growth_updates, window=options.window, highest=options.ceiling)  # type: ignore[arg-type]
        self.scales = GradientScales(len(self.model.resblocks), 1, rules) if arm.scope != "none" else None
        groups: list[ShardGroup] = [
            {"params": [p], "weight_decay": 0.045 if self.tags[name].decays else 0.0, "packed": arm.packed and self.tags[name].is_block_matrix}
            for name, p in self.model.named_parameters()
        ]
        recipe = DalleFit()
        self.adam = PaperAdamW(groups, betas=(recipe.beta1, recipe.beta2), clip_variance=recipe.clip_variance)
        self.clip = recipe.clip_norm
        self.skipped = 0

    def gradients(self, step: int) -> float:
        """Run the forward and backward pass of a batch, leave the gradients scaled, and return the loss."""
        values = self.scales.values() if self.scales is not None else [1.0] * len(self.model.resblocks)
        for block, value in zip(self.model.resblocks, values, strict=True):
            block.gradient_scale = value  # type: ignore[assignment]
            block.filter_gradients = self.scales is not None  # type: ignore[assignment]
        self.model.zero_grad(set_to_none=True)
        text, image = self.model(*batch_of(step, self.options))
        loss = text.mean() / 8 + image.mean() * 7 / 8
        loss.backward()
        return float(loss.detach())

    def settle(self, step: int) -> None:
        """Set the scales to the values that they would have after a long run: one bit less than the largest with which the gradients of a batch do not overflow."""
        if self.scales is None:
            return
        rules, bad = self.scales.rules, [True] * len(self.model.resblocks)
        self.scales.exponents = [float(rules.highest) + 1] * len(self.scales.exponents)
        while any(bad) and max(self.scales.exponents) > rules.lowest:
            lower = bad if len(self.scales.exponents) == len(bad) else [any(bad)]
            self.scales.exponents = [max(e - down, float(rules.lowest)) for e, down in zip(self.scales.exponents, lower, strict=True)]
            self.gradients(step)
            bad = [False] * len(bad)
            for name, p in self.model.named_parameters():
                block = self.tags[name].resblock
                if block is not None and p.grad is not None:
                    bad[block] |= not bool(p.grad.isfinite().all())
        self.scales.exponents = [max(e - 1, float(rules.lowest)) for e in self.scales.exponents]

    def update(self, step: int) -> float:
        """Make one update, and return the loss before it."""
        loss = self.gradients(step)
        values = [*(self.scales.values() if self.scales is not None else [1.0] * len(self.model.resblocks)), 1.0]
        bad, squares = [False] * len(values), 0.0
        for group, (name, p) in zip(self.adam.param_groups, self.model.named_parameters(), strict=True):
            slot = -1 if (block := self.tags[name].resblock) is None else block
            assert p.grad is not None
            norm = float(p.grad.norm())
            bad[slot] |= norm - norm != 0.0
            group["factor"], squares = 1 / values[slot], squares + (norm / values[slot]) ** 2
        if self.scales is not None:
            self.scales.update(step, bad[:-1])
        if any(bad):
            self.skipped += 1
            return loss
        clip = min(1.0, self.clip / (squares**0.5 + 1e-6))
        self.adam.count += step > 0
        for group in self.adam.param_groups:
            group |= {"lr": warmup(step, self.options.lr, 50), "factor": group["factor"] * clip}
        self.adam.step()
        return loss


def _install_floor(model: nn.Module, tags: dict[str, Any], floor: int) -> None:
    """Round the gradient of every fp16 tensor inside the branches: inputs and outputs of products, and block matrices."""
    for module in model.modules():
        if isinstance(module, Projection):
            module.register_forward_pre_hook(lambda _, inputs: (_Floor.apply(inputs[0], floor),))
            module.register_forward_hook(lambda _, __, output: _Floor.apply(output, floor))
    for name, p in model.named_parameters():
        if tags[name].is_block_matrix:
            p.register_hook(lambda grad: raise_floor(grad, floor))


def batch_of(step: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Random captions and pictures. The first row of a picture repeats the caption, and every other code follows from the code above it, except a tenth, which are
    random."""
    generator = torch.Generator().manual_seed(1000 * options.seed + step)
    text = torch.randint(0, SHAPE.text_vocab, (options.batch, SHAPE.text_tokens), generator=generator)
    codes = torch.randint(0, SHAPE.image_vocab, (options.batch, SHAPE.image_tokens), generator=generator)
    noise = torch.rand(codes.shape, generator=generator) < 0.1
    for place in range(SHAPE.image_tokens):
        told = text[:, place] if place < SHAPE.grid else (5 * codes[:, place - SHAPE.grid] + 7) % SHAPE.image_vocab
        codes[:, place] = torch.where(noise[:, place], codes[:, place], told)
    return text, torch.full((options.batch,), SHAPE.text_tokens), codes


def lost_shares(run: Run, step: int) -> list[float]:
    """For each resblock, the fraction of its matrices' gradient values that are exactly zero, although they are not in fp32 with the same weights."""
    reference = Run(Arm("fp32", torch.float32), run.options, 0)
    reference.model.load_state_dict(run.model.state_dict())
    reference.gradients(step)
    run.gradients(step)
    lost, total = [0.0] * len(run.model.resblocks), [0.0] * len(run.model.resblocks)
    for (name, p), (_, q) in zip(run.model.named_parameters(), reference.model.named_parameters(), strict=True):
        tag = run.tags[name]
        if tag.is_block_matrix and tag.resblock is not None and p.grad is not None and q.grad is not None:
            present = q.grad != 0
            lost[tag.resblock] += float((present & (p.grad == 0)).sum())
            total[tag.resblock] += float(present.sum())
    return [part / max(whole, 1.0) for part, whole in zip(lost, total, strict=True)]


class _ArmRun(stored.Stored):
    seed: int
    floor_bits: int
    arm: str


class _File(stored.Stored):
    """A file of these runs."""

    options: dict[str, Any]
    commit: str
    runs: list[_ArmRun]


def experiment(options: Options, seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Train all arms at all floors (fp32 once) for each seed, and write the file after each run. Runs that ``out`` already holds are not repeated.

    Raises:
        SystemExit: ``out`` holds runs with other options, or from another version of the code.
    """
    settings = json.loads(json.dumps({key: value for key, value in asdict(options).items() if key not in ("seed", "floors")}))
    model = Run(ARMS[0], options, 0).model
    found: dict[str, Any] = {
        "options": settings | {"floors": list(options.floors), "seeds": list(seeds)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "runs": [],
    } | producer()
    there: dict[tuple[int, int, str], dict[str, Any]] = {}
    if out.exists():
        before = stored.read(str(out), _File, "repair it, or give another --name")
        same = all(before["options"].get(key) == value for key, value in settings.items()) and before["commit"] == found["commit"]
        if not same:
            raise SystemExit(f"{out} holds runs with {before['options']} at commit {before['commit']}: give another --name, or remove it")
        there = {(run["seed"], run["floor_bits"], run["arm"]): run for run in before["runs"]}
    for seed in seeds:
        for floor, arm in ((floor, arm) for floor in options.floors for arm in ARMS):
            if arm.dtype == torch.float32 and floor != options.floors[0]:
                continue
            found["runs"].append(there.pop((seed, floor, arm.name), None) or _run(arm, replace(options, seed=seed), floor))
            with atomic(out) as file:
                file.write(json.dumps(found | {"runs": found["runs"] + list(there.values())}).encode() + b"\n")
    return found


def _run(arm: Arm, options: Options, floor: int) -> dict[str, Any]:
    run = Run(arm, options, floor)
    run.settle(0)  # a short run has no time to double its scales up to there
    losses = [run.update(step) for step in range(options.updates)]
    tail = losses[-max(1, options.updates // 10) :]
    result: dict[str, Any] = {
        "arm": arm.name,
        "floor_bits": floor,
        "seed": options.seed,
        "losses": [(round(x, 1), round(y, 4)) for x, y in thin(list(enumerate(losses)), _POINTS)],
        "last_tenth": sum(tail) / len(tail),
    }
    run.settle(options.updates)
    result |= {"skipped": run.skipped, "lost_share": [round(share, 5) for share in lost_shares(run, options.updates)]}
    if run.scales is not None:
        result["scale_exponents"] = run.scales.exponents
    print(f"seed {options.seed}, floor {floor}, {arm.name}: {result['last_tenth']:.4f} nats, {run.skipped} skipped", flush=True)
    return result


def main(words: list[str]) -> None:
    """Run the experiment, write its JSON file and print a table; or render the page from the existing files."""
    parser = argparse.ArgumentParser(prog="python -m train.experiments.precision", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--name", default="deep", help="name of the JSON file below docs/experiments/precision")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--render", action="store_true", help="write docs/precision.md instead")
    for name in ("layers", "width", "updates", "batch", "growth_updates", "window", "ceiling"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Options, name))
    parser.add_argument("--floors", type=int, nargs="+", default=list(Options.floors), help="bits by which to raise the exponent floor of fp16")
    parser.add_argument("--lr", type=float, default=Options.lr)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = vars(parser.parse_args(words))
    docs, name, render, seeds = (given.pop(key) for key in ("docs", "name", "render", "seeds"))
    if render:
        precision_page.write(docs)
        return
    out = docs / "experiments" / "precision" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found = experiment(Options(**given | {"floors": tuple(given["floors"])}), seeds, out)
    print(precision_page.table(found["runs"]))


if __name__ == "__main__":
    in_a_sentence(main)
