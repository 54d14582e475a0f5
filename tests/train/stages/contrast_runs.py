"""What is measured of the caption-contrastive objective in one and in two processes; tests/train/stages/test_dalle_contrast.py judges it."""

from __future__ import annotations

import contextlib
import io
import shutil
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from infra.errors import StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.stopped_run import StopAfter
from tests.train.engines.zero_cases import BATCH, LR, Case, batch_of, everything, make_engine, make_model, true_gradients
from train.config import RunConfig, load_run
from train.config_compression import CompressionSection
from train.run.stage_table import STAGES
from train.stages.dalle_contrast import ContrastTask

CPU = torch.device("cpu")
BETA, WEIGHT, UPDATES = 0.3, 2.0, 3
OPTIONS: dict[str, Any] = {"objective": "caption_contrast", "init_from": "export", "contrast_beta": BETA, "contrast_lambda": WEIGHT}
CASES = [
    Case(stage=1, accumulation=2),
    Case(stage=2, checkpointing=True),
    Case(stage=3, accumulation=2),
    Case(stage=1, precision="fp16"),
    Case(stage=3, precision="fp16", checkpointing=True, accumulation=2),
]
COMPRESSED = Case(stage=2, precision="fp16", sharding="node", accumulation=2)
ALONE = Case(stage=2)


def update_of(step: int) -> dict[str, Any]:
    """The samples of an update. Two in a row share a caption, every eighth has none, and the first one of the next pair also owns its caption."""
    whole: dict[str, Any] = batch_of(step)
    whole["caption_keys"] = torch.where(whole["lengths"] > 0, torch.arange(BATCH) // 2 + 1, 0)
    whole["own_keys"] = [[key, key + 1] if key % 5 == 0 else [key] for key in (torch.arange(BATCH) // 2 + 1).tolist()]
    whole["ids"] = [str(row) for row in range(BATCH)]
    return whole


def pairs_of(whole: dict[str, Any]) -> list[int]:
    """By hand: the row whose caption each row is contrasted with; its own if there is none."""
    keys, found = whole["caption_keys"].tolist(), []
    for row in range(BATCH):
        after = [*range(row + 1, BATCH), *range(row)]
        allowed = [other for other in after if keys[other] and keys[other] not in whole["own_keys"][row]]
        found.append(allowed[0] if keys[row] and allowed else row)
    return found


def micro_batches(world: World, step: int, accumulation: int) -> list[dict[str, Any]]:
    """This rank's, as the loader divides them: every R-th sample of each."""
    whole, size = update_of(step), BATCH // accumulation
    rows = [list(range(start, start + size))[world.rank :: world.size] for start in range(0, BATCH, size)]
    return [
        {key: [value[row] for row in part] if isinstance(value, list) else value[torch.tensor(part)] for key, value in whole.items()} for part in rows
    ]


def engine_of(case: Case, world: World, compression: CompressionSection | None = None, **changes: Any) -> Any:
    """The engine of a case with the weights of seed 0, whose frozen weights are those of seed 1."""
    engine = make_engine(case, world, compression=compression, node=1, **(OPTIONS | changes))
    others = dict(make_model(seed=1).named_parameters())
    for name, fragment in engine.fragments(to_load=True).items():
        kind, _, parameter = name.partition("/")
        if kind == "frozen":
            fragment.tensor.copy_(others[parameter].detach().flatten().narrow(0, fragment.offset, fragment.tensor.numel()))
    return engine


def task_of(engine: Any, world: World, validation: list[Any] | None = None) -> ContrastTask:
    return ContrastTask(RunConfig(dalle_fit=engine.fit), CPU, engine.module, validation or [], world)


def backward(engine: Any, task: ContrastTask, world: World, step: int, accumulation: int) -> dict[str, float]:
    """An update up to its step; what is logged of it."""
    batches = micro_batches(world, step, accumulation)
    denominators = task.denominators(batches)
    sums = dict.fromkeys(task.metrics, 0.0)
    for index, batch in enumerate(batches):
        engine.micro_batch(last=index == accumulation - 1)
        loss = task.loss(engine, batch, step, {}, denominators)
        engine.backward(loss.total)
        assert set(loss.sums) == set(sums)
        sums = {name: sums[name] + float(value) for name, value in loss.sums.items()}
    vector = torch.tensor(list(sums.values()), dtype=torch.float64)
    if world.size > 1:
        dist.all_reduce(vector)
    return dict(zip(sums, vector.tolist(), strict=True))


def by_hand(step: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures and gradients of the formula in one process, differentiated by autograd."""
    whole, others = update_of(step), torch.tensor(pairs_of(update_of(step)))
    model, frozen = make_model(), make_model(seed=1).requires_grad_(False)
    own, other = (
        tuple(-m(whole["text"][rows], whole["lengths"][rows], whole["codes"])[1].double() for m in (model, frozen))
        for rows in (torch.arange(BATCH), others)
    )
    ratio_B, other_B = ((mine - theirs).sum(1) for mine, theirs in (own, other))
    counts_B = (others != torch.arange(BATCH)).double()
    loss = (-torch.log(torch.sigmoid(BETA * ratio_B)) - WEIGHT * counts_B * torch.log(torch.sigmoid(-BETA * other_B))).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    ratio_B, other_B = ratio_B.detach(), other_B.detach()
    figures = {
        "loss": float(loss.detach()),
        "loss_image": -float(own[0].detach().mean()),
        "loss_image_other": -float((other[0].detach().mean(1) * counts_B).sum() / counts_B.sum()),
        "reward": BETA * float(ratio_B.mean()),
        "reward_other": BETA * float((other_B * counts_B).sum() / counts_B.sum()),
        "reward_accuracy": float(((ratio_B > other_B) * counts_B).sum() / counts_B.sum()),
    }
    gradients = {name: torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for name, p in model.named_parameters()}
    return figures, gradients


def measured(case: Case, world: World, compression: CompressionSection | None = None) -> dict[str, Any]:
    """Three updates of a case: what is logged; how far figures and gradients of the first are from those by hand; what the frozen passes leave."""
    engine = engine_of(case, world, compression)
    task = task_of(engine, world)
    frozen = {name: value for name, value in everything(engine).items() if name.startswith("frozen/")}
    logged, apart = [], 0.0
    for step in range(UPDATES):
        logged.append(backward(engine, task, world, step, case.accumulation))
        if step == 0 and compression is None:
            found = true_gradients(engine)
            gradient = torch.cat([found.get(name, torch.zeros(p.numel())) for name, p in make_model().named_parameters()])
            if world.size > 1:
                dist.all_reduce(gradient)
            right = torch.cat(list(by_hand(step)[1].values()))
            apart = float((gradient - right).norm() / right.norm())
        logged[-1]["norm"] = engine.step(LR).grad_norm
    before, inputs = everything(engine), (batch_of(9)["text"], batch_of(9)["lengths"], batch_of(9)["codes"])
    with torch.no_grad():
        trained = engine(*inputs)[1]
        with engine.frozen(evaluates=False):
            within = engine(*inputs)[1]
        again = engine(*inputs)[1]
        start = make_model(seed=1)(*inputs)[1]
    after = everything(engine)
    return {
        "logged": logged,
        "gradient": apart,
        "frozen": float((within - start).norm() / start.norm()),
        "moved": float((trained - start).norm() / start.norm()),
        "same": bool(torch.equal(trained, again)) and all(torch.equal(before[name], after[name]) for name in before),
        "kept": bool(frozen) and all(torch.equal(after[name], value) for name, value in frozen.items()),
    }


def chosen(world: World, accumulation: int) -> dict[str, tuple[list[int], int, float]]:
    """What every sample of this rank is contrasted with."""
    engine = mock.Mock(fit=RunConfig().dalle_fit, module=make_model())
    batches = micro_batches(world, 0, accumulation)
    task_of(engine, world).denominators(batches)
    return {
        name: (text.tolist(), int(length), float(has))
        for batch in batches
        for name, text, length, has in zip(batch["ids"], batch["other_text"], batch["other_lengths"], batch["has_other"], strict=True)
    }


def evaluated(world: World) -> tuple[dict[str, float], dict[str, float]]:
    """Evaluations of weights that are the frozen ones, and after an update."""
    engine = make_engine(ALONE, world, **OPTIONS)
    rows = {key: value[world.rank :: world.size] for key, value in batch_of(7).items()}
    validation = [rows | {"ids": [f"{world.rank} {row}" for row in range(len(rows["codes"]))]}]
    task = task_of(engine, world, validation)
    first = task.evaluate(engine, 0, mock.Mock())
    backward(engine, task, world, 0, 1)
    engine.step(LR)
    return first, task.evaluate(engine, 1, mock.Mock())


def on_two(world: World) -> dict[str, Any]:
    return {
        "cases": {str(case): measured(case, world) for case in CASES},
        "compressed": measured(COMPRESSED, world, CompressionSection(method="powersgd", rank=8, wire="fp32")),
        "chosen": [chosen(world, accumulation) for accumulation in (1, 3)],
        "evaluated": evaluated(world),
    }


def on_one(world: World) -> dict[str, Any]:
    kinds = [
        {name.partition("/")[0] for name in make_engine(ALONE, world, **options).fragments(to_load=to_load)}
        for options, to_load in ((dict[str, Any](), True), (OPTIONS, False))
    ]
    return {"alone": measured(ALONE, world), "chosen": chosen(world, 2), "kinds": kinds}


def stopped_and_resumed(world: World, whole: str, broken: str, start: str) -> tuple[str, str]:
    """Stage dalle of two copies of a run, one of which is stopped after four updates and loses the export that it started from; what was printed, and at the stop."""
    said, stopped = io.StringIO(), ""
    for root, stop in ((whole, StopFlag()), (broken, StopAfter(3)), (broken, StopFlag())):
        run = RunFolder(f"{root}/tiny")
        try:
            with contextlib.redirect_stdout(said):
                STAGES["dalle"].function()(load_run(run.config_url, []), run, world, stop)
        except StopRequested as error:
            stopped = str(error)
            shutil.rmtree(start)
    return said.getvalue(), stopped
