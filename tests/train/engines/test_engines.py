"""Both engines against plain AdamW in one process: losses, weights, averages, restores on other numbers of ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infra import storage
from infra.errors import CheckpointError, ConfigError
from infra.world import World
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer
from tests.support.counts import global_sum
from tests.support.ranks import run_in_ranks
from train.config import DalleFit, ZeroSection
from train.engines.replicated import ReplicatedEngine, decay_groups
from train.engines.zero import internals
from train.engines.zero.engine import ZeroEngine
from train.weights import checkpoint

SHAPE = StreamShape(text_tokens=6, text_vocab=20, grid=3, image_vocab=11)
CONFIG = TransformerConfig(layers=2, width=16, heads=2, conv_kernel=3)
FIT = DalleFit(batch=8, accumulation=2, lr=1e-2, clip_norm=0.5, ema=0.5, ema_every=1, steps=6)
LR = 1e-2


def make_model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG, SHAPE)


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """The global batch of an update, with captions of unequal lengths."""
    generator = torch.Generator().manual_seed(step)
    return {
        "text": torch.randint(0, SHAPE.text_vocab, (FIT.batch, SHAPE.text_tokens), generator=generator),
        "lengths": torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]).roll(step),
        "codes": torch.randint(0, SHAPE.image_vocab, (FIT.batch, SHAPE.image_tokens), generator=generator),
    }


def comparable(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the key biases: the loss does not depend on them, so Adam blows the rounding of their gradients up to full steps."""
    kept = {name: weight for name, weight in weights.items() if not name.endswith("k.bias")}
    assert len(kept) == len(weights) - CONFIG.layers
    return kept


def weighted(nll: tuple[torch.Tensor, torch.Tensor], text_count: float, image_count: float) -> torch.Tensor:
    return nll[0].sum() / text_count / 8 + nll[1].sum() / image_count * 7 / 8


def reference(steps: int) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    """Plain PyTorch on the whole batch: losses, final weights, gradient norms."""
    model = make_model()
    adam = torch.optim.AdamW(decay_groups(model.named_parameters(), FIT.weight_decay), lr=LR, betas=(FIT.beta1, FIT.beta2), eps=1e-8)
    losses, norms = [], []
    for step in range(steps):
        batch = batch_of(step)
        loss = weighted(model(batch["text"], batch["lengths"], batch["codes"]), float(batch["lengths"].sum()), float(batch["codes"].numel()))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), FIT.clip_norm).item())
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def make_engine(kind: str, model: nn.Module, world: World) -> Any:
    if kind == "replicated":
        return ReplicatedEngine(
            model, world, betas=(FIT.beta1, FIT.beta2), weight_decay=FIT.weight_decay, ema=FIT.ema, ema_every=FIT.ema_every, clip_norm=FIT.clip_norm
        )
    return ZeroEngine(model, FIT, ZeroSection(stage=int(kind[-1])), world)  # type: ignore[arg-type]


def updates(engine: Any, world: World, start: int, stop: int, poison: int = -1) -> list[tuple[float, float, bool]]:
    """Loss, gradient norm and fate of updates; each rank takes its rows in FIT.accumulation micro-batches."""
    out = []
    for step in range(start, stop):
        whole = batch_of(step)
        each = FIT.batch // (world.size * FIT.accumulation)
        micro = [{key: value[(world.rank + world.size * m) * each :][:each] for key, value in whole.items()} for m in range(FIT.accumulation)]
        count = global_sum(
            {"text": sum(int(b["lengths"].sum()) for b in micro), "image": sum(b["codes"].numel() for b in micro)}, torch.device("cpu")
        )
        total = torch.zeros(())
        for m, b in enumerate(micro):
            engine.micro_batch(last=m == FIT.accumulation - 1)
            loss = weighted(engine(b["text"], b["lengths"], b["codes"]), count["text"], count["image"])
            total += loss.detach()
            if step == poison and world.rank == world.size - 1:
                loss = loss * float("inf")
            engine.backward(loss)
        if world.size > 1:
            torch.distributed.all_reduce(total)
        update = engine.step(LR)
        out.append((total.item(), update.grad_norm, update.applied))
    return out


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def meta_of(engine: Any) -> dict[str, Any]:
    return {"shapes": {n: list(p.shape) for n, p in engine.module.named_parameters()}, "updates": engine.updates, "loader": {}, "elapsed_s": 0.0}


def train_and_save(world: World, folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for kind in ("replicated", "zero1", "zero2"):
        engine = make_engine(kind, make_model(), world)
        first = updates(engine, world, 0, 3)
        checkpoint.save(f"{folder}/{kind}-{world.size}", 3, engine.fragments(to_load=False), meta_of(engine), world, keep=2)
        rest = updates(engine, world, 3, 6)
        out[kind] = (first + rest, whole_state(engine), dict(engine.average.values))
        out[f"around {kind}"] = around_a_skipped_update(kind, world)
        before = whole_state(engine)
        poisoned = updates(engine, world, 6, 7, poison=6)
        out[kind] += (poisoned[0][2], all(torch.equal(before[n], p) for n, p in whole_state(engine).items()))
        out[kind] += (updates(engine, world, 7, 8)[0][2],)
    out["refusals"] = [refusal("SERIES", "0.1.", world), refusal("NEEDED", {2: ("no_such_attribute",)}, world)]
    out["refusals"].append(refusal("NEEDED_OF_MODULES", {internals.stage3: ("no_such_function",)}, world))
    return out


def around_a_skipped_update(kind: str, world: World) -> bool:
    """Whether updates after a skipped one are, bit for bit, those without it: it counts in no bias correction and no average."""
    ends = []
    for skips in (True, False):
        engine = make_engine(kind, make_model(), world)
        history = updates(engine, world, 0, 2)
        if skips:
            assert next(applied for *_, applied in updates(engine, world, 2, 4, poison=2)) is False
        else:
            updates(engine, world, 3, 4)
        history += updates(engine, world, 4, 6)
        engine.average.wait()
        ends.append((history, engine.updates, whole_state(engine), dict(engine.average.values)))
    (history, count, *tensors), (wanted, wanted_count, *others) = ends
    return (
        history == wanted and count == wanted_count and all(torch.equal(a[name], b[name]) for a, b in zip(tensors, others, strict=True) for name in b)
    )


def refusal(name: str, value: Any, world: World) -> str:
    """What the ZeRO engine says when DeepSpeed is not as it knows it."""
    kept = getattr(internals, name)
    setattr(internals, name, value)
    try:
        make_engine("zero2", make_model(), world)
    except ConfigError as error:
        return str(error)
    finally:
        setattr(internals, name, kept)
    return "accepted"


def load_and_go_on(world: World, folder: str, saved_on: int) -> dict[Any, Any]:
    out = {}
    for saved in ("replicated", "zero2"):
        for kind in ("replicated", "zero1", "zero2"):
            torch.manual_seed(99)  # other initial weights: everything must come from the checkpoint
            engine = make_engine(kind, Transformer(CONFIG, SHAPE), world)
            meta = checkpoint.load_newest(f"{folder}/{saved}-{saved_on}", engine.fragments(to_load=True), world)
            assert meta is not None
            engine.loaded(meta["updates"])
            out[saved, kind] = (updates(engine, world, 3, 6), whole_state(engine))
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[int, list[dict[str, Any]]]]:
    folder = str(tmp_path_factory.mktemp("engines"))
    return folder, {size: run_in_ranks(train_and_save, size, folder) for size in (1, 2)}


@pytest.mark.parametrize("kind", ["replicated", "zero1", "zero2"])
@pytest.mark.parametrize("size", [1, 2])
def test_an_engine_follows_plain_adamw_on_the_whole_batch(trained: Any, kind: str, size: int) -> None:
    losses, weights, norms = reference(6)
    for rank in trained[1][size]:
        history, found, _, *_ = rank[kind]
        assert [h[0] for h in history] == pytest.approx(losses, rel=2e-6)
        assert [h[1] for h in history] == pytest.approx(norms, rel=1e-4)
        assert all(h[2] for h in history)
        for name, weight in comparable(weights).items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", ["replicated", "zero1", "zero2"])
def test_an_infinity_on_one_rank_skips_the_update_everywhere_and_training_goes_on(trained: Any, kind: str) -> None:
    for rank in trained[1][2]:
        *_, applied, unchanged, next_applied = rank[kind]
        assert not applied and unchanged and next_applied


@pytest.mark.parametrize("kind", ["replicated", "zero1", "zero2"])
def test_a_skipped_update_counts_in_no_bias_correction_and_no_average(trained: Any, kind: str) -> None:
    for size in (1, 2):
        assert all(rank[f"around {kind}"] for rank in trained[1][size])


def test_another_deepspeed_is_refused_at_start(trained: Any) -> None:
    version, attribute, function = trained[1][1][0]["refusals"]
    assert "lacks what train/engines/zero/ depends on: deepspeed.runtime.zero.stage3.no_such_function" in function
    assert "is installed; train/engines/zero/ was written for 0.1.x (requirements.txt)" in version
    assert "lacks what train/engines/zero/ depends on: no_such_attribute" in attribute


@pytest.mark.parametrize(("saved_on", "size"), [(2, 1), (1, 2), (2, 2)])
def test_a_checkpoint_restores_into_any_engine_on_any_number_of_ranks(trained: Any, saved_on: int, size: int) -> None:
    folder, histories = trained
    for rank, found in enumerate(run_in_ranks(load_and_go_on, size, folder, saved_on)):
        for (saved, kind), (history, weights) in found.items():
            expected, final, *_ = histories[saved_on][0][saved]
            exact = size == saved_on and saved == kind
            if exact:
                assert history == expected[3:]
                assert all(torch.equal(weights[name], w) for name, w in histories[saved_on][rank][saved][1].items())
            else:
                assert [h[0] for h in history] == pytest.approx([h[0] for h in expected[3:]], rel=1e-5)
                for name, weight in comparable(final).items():
                    torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-5)


def test_averages_are_saved_whole_and_read_without_an_engine(trained: Any) -> None:
    folder = trained[0]
    url = checkpoint.folder(f"{folder}/zero2-2", 3)
    average = checkpoint.read_tensors(url, "average")
    model = make_model()
    assert {n: t.shape for n, t in average.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert any(not torch.equal(average[n], p) for n, p in model.named_parameters())
    exact = checkpoint.read_tensors(checkpoint.folder(f"{folder}/zero2-1", 3), "average")
    for name, tensor in comparable(average).items():
        torch.testing.assert_close(tensor, exact[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(CheckpointError, match="holds no 'elsewhere/"):
        checkpoint.read_tensors(url, "elsewhere")


def copy_of(trained: Any, tmp_path: Path) -> tuple[str, Any]:
    folder = f"{tmp_path}/stage"
    storage.download_folder(checkpoint.folder(f"{trained[0]}/zero2-1", 3), Path(checkpoint.folder(folder, 3)))
    engine = ReplicatedEngine(make_model(), World.single(), betas=(0.9, 0.96), weight_decay=0.0, ema=0.5)
    checkpoint.load(folder, 3, engine.fragments(to_load=True))
    return folder, engine


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_is_used(trained: Any, tmp_path: Path) -> None:
    folder, engine = copy_of(trained, tmp_path)
    checkpoint.save(folder, 5, engine.fragments(to_load=False), meta_of(engine), World.single(), keep=2)
    assert checkpoint.complete(folder) == [3, 5]
    file = Path(checkpoint.folder(folder, 5), "rank-0.bin")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged: the hash of bytes"):
        checkpoint.load(folder, 5, engine.fragments(to_load=True))
    meta = checkpoint.load_newest(folder, engine.fragments(to_load=True), World.single())
    assert meta is not None and meta["step"] == 3
    file.unlink()
    with pytest.raises(CheckpointError, match=r"rank-0\.bin: does not exist"):
        checkpoint.load(folder, 5, engine.fragments(to_load=True))
    Path(checkpoint.folder(folder, 3), "rank-0.bin").unlink()
    with pytest.raises(CheckpointError, match=r"rank-0\.bin: does not exist"):
        checkpoint.load_newest(folder, engine.fragments(to_load=True), World.single())


def test_a_checkpoint_without_its_marker_does_not_exist(trained: Any, tmp_path: Path) -> None:
    folder, engine = copy_of(trained, tmp_path)
    Path(checkpoint.folder(folder, 3), "meta.json").unlink()
    assert checkpoint.load_newest(folder, engine.fragments(to_load=True), World.single()) is None


def test_a_checkpoint_of_another_shape_is_refused(trained: Any, tmp_path: Path) -> None:
    folder, _ = copy_of(trained, tmp_path)
    wider = ReplicatedEngine(Transformer(dataclasses.replace(CONFIG, width=32), SHAPE), World.single(), betas=(0.9, 0.96), weight_decay=0.0, ema=0.5)
    with pytest.raises(CheckpointError, match="elements, this configuration builds"):
        checkpoint.load(folder, 3, wider.fragments(to_load=True))
    deeper = Transformer(dataclasses.replace(CONFIG, layers=CONFIG.layers + 1), SHAPE)
    engine = ReplicatedEngine(deeper, World.single(), betas=(0.9, 0.96), weight_decay=0.0, ema=0.5)
    with pytest.raises(CheckpointError, match=r"step-00000003: holds no '\w+/resblocks"):
        checkpoint.load(folder, 3, engine.fragments(to_load=True))


def test_an_engine_that_was_restored_counts_on_from_any_number_of_updates() -> None:
    engine = ReplicatedEngine(nn.Linear(3, 2), World.single(), betas=(0.9, 0.96), weight_decay=0.0, ema=0.5)
    engine.fragments(to_load=True)
    engine.loaded(7)
    assert engine.updates == 7 and [float(state["step"]) for state in engine.optimizer.state.values()] == [7.0, 7.0]
    engine.module(torch.ones(3)).sum().backward()
    engine.step(0.1)
    assert engine.updates == 8 and [float(state["step"]) for state in engine.optimizer.state.values()] == [8.0, 8.0]


def test_a_checkpoint_before_the_first_applied_update_is_whole() -> None:
    engine = ReplicatedEngine(nn.Linear(3, 2), World.single(), betas=(0.9, 0.96), weight_decay=0.0, ema=0.5)
    assert len(engine.fragments(to_load=False)) == 8 and engine.fragments(to_load=False).keys() == engine.fragments(to_load=True).keys()


def test_only_the_newest_checkpoints_are_kept_and_none_is_pickled(tmp_path: Path) -> None:
    engine = ReplicatedEngine(nn.Linear(3, 2), World.single(), betas=(0.9, 0.96), weight_decay=0.0, ema=0.5)
    for step in (1, 2, 3):
        url = checkpoint.save(str(tmp_path), step, engine.fragments(to_load=False), meta_of(engine), World.single(), keep=2)
    assert checkpoint.complete(str(tmp_path)) == [2, 3]
    assert sorted(path.name for path in Path(url).iterdir()) == ["index.json", "meta.json", "rank-0.bin", "rank-0.json"]
    held = json.loads(Path(url, "rank-0.json").read_text())["tensors"]["model/weight"]
    raw = Path(url, "rank-0.bin").read_bytes()[held["start"] : held["start"] + 4 * held["length"]]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.float32), engine.module.weight.detach().flatten())


def test_other_state_than_tensors_does_not_enter_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"belongs in meta\.json"):
        checkpoint.save(str(tmp_path), 1, {"note": "text"}, {}, World.single(), keep=1)  # type: ignore[dict-item]
