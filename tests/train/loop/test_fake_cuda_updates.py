"""Updates and evaluations of every training stage on CUDA without CUDA: the training loop, our parts of the engines, and one wait of the host in an update.
About 15 s. DeepSpeed's half is a stand-in (tests/support/zero_stand_in.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.attention import DenseAttention
from model.clip import Clip
from model.dvae import DVAE
from model.transformer import Transformer
from tests.support import zero_stand_in
from tests.support.fake_cuda import HostWait, Watch, fake_cuda, is_cuda
from train.config import RunConfig, load_run
from train.engines.replicated import ReplicatedEngine
from train.engines.zero.engine import ZeroEngine
from train.loop.goodput import Goodput
from train.loop.trainer import Trainer
from train.loop.watching import Watched
from train.optimizer import adamw_kernel, muon
from train.optimizer.loss_scale import LossScale
from train.ranks.signal_vector import SignalVector
from train.stages.clip_task import BothTowers, ClipTask
from train.stages.dalle_contrast import ContrastTask
from train.stages.dalle_task import DalleTask
from train.stages.dvae_task import DvaeTask
from train.weights.checkpointer import Checkpointer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests marked gpu ask it itself")
CUDA = torch.device("cuda")
MESSAGE = "train/ranks/signal_vector.py"
OVERRIDES = [
    "dalle.layers=3",
    "dalle_fit.accumulation=2",
    "dalle_fit.caption_dropout=0.1",
    "dalle_fit.numerics_every=2",
    "dalle_fit.histograms_every=2",
    "scales.filter=true",
]


def tiny(*overrides: str) -> RunConfig:
    return load_run("tiny", [*OVERRIDES, *overrides])


def batch_of(cfg: RunConfig, count: int = 4) -> dict[str, Any]:
    """On the CPU, as loaders give it."""
    shape = cfg.stream_shape()
    return {
        "ids": [str(index) for index in range(count)],
        "pixels": torch.rand(count, 3, cfg.dvae.image_size, cfg.dvae.image_size),
        "text": torch.zeros(count, shape.text_tokens, dtype=torch.int64),
        "lengths": torch.arange(count) % shape.text_tokens,
        "codes": torch.zeros(count, shape.image_tokens, dtype=torch.int64),
    }


class Batches:
    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = batch

    def next(self) -> dict[str, Any]:
        return self.batch

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def trainer(name: str, task: Any, engine: Any, section: Any, cfg: RunConfig, folder: Path) -> Trainer:
    """A trainer in front of its first update."""
    made = Trainer(name, task, engine, Batches(batch_of(cfg)), section, RunFolder(str(folder)), World.single(), StopFlag(), CUDA)
    made._saver, made._writer = Checkpointer(str(folder), World.single(), 1), mock.Mock()
    made._bad = made._overflows = 0
    made._stall_s = made._units = made._update_s = 0.0
    made._counts = {"forward_non_finite": 0, "gradient_overflow": 0}
    made._watched = Watched(name, section, World.single(), CUDA, 0)
    made._goodput, made._vector = Goodput(0.0, 0.0), SignalVector((*task.metrics, "samples"), CUDA)
    return made


def waits_of_updates(made: Trainer, watch: Watch, updates: int = 2) -> list[str]:
    """Where the host waited in each of some updates."""
    before = len(watch.waits)
    for step in range(updates):
        made._update(step, 0.0)
    return [wait.place.partition(":")[0] for wait in watch.waits[before:]]


def launched(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Any, copy: Tensor | None = None) -> None:
    """In place of the launch of the fused kernel (tests/train/optimizer/ compiles it): what it reads and writes lies on the GPU, end to end."""
    given = [p, grad, mean, variance] if copy is None else [p, grad, mean, variance, copy]
    assert is_cuda(given) and len({t.numel() for t in given}) == 1 and all(t.is_contiguous() for t in given)


def launched_once(p: Tensor, grads: list[Tensor], mean: Tensor, variance: Tensor, hyper: Any, copy: Tensor | None = None) -> None:
    """The same for a gradient in pieces."""
    given = [p, mean, variance] if copy is None else [p, mean, variance, copy]
    assert is_cuda([*given, *grads]) and len({t.numel() for t in given}) == 1 and all(t.is_contiguous() for t in [*given, *grads])
    assert sum(grad.numel() for grad in grads) == p.numel() and len({grad.dtype for grad in grads}) == 1


@contextmanager
def sharded(watch: Watch, cfg: RunConfig) -> Iterator[ZeroEngine]:
    with ExitStack() as stack:
        stack.enter_context(zero_stand_in.installed())
        stack.enter_context(mock.patch.object(adamw_kernel, "update", launched))
        stack.enter_context(mock.patch.object(adamw_kernel, "update_pieces", launched_once))
        with watch.setting_up(), CUDA:
            shape = cfg.stream_shape()
            model = Transformer(cfg.dalle, shape, branch_dtype=torch.float16, attend=DenseAttention(cfg.dalle, shape).to(CUDA))
            engine = ZeroEngine(model, cfg.dalle_fit, cfg.zero, World.single(), cfg.scales)
        yield engine


def test_an_update_of_the_transformer_waits_once_for_the_step_s_message(tmp_path: Path) -> None:
    """With scales for each resblock, numerics measured in every second update, averages on a side stream and a checkpoint between."""
    cfg = tiny("dalle_fit.precision=fp16", "dalle_fit.moments=16-bit", "zero.stage=3", "zero.weights=fp16")
    with fake_cuda(MESSAGE) as watch, sharded(watch, cfg) as engine:
        made = trainer("dalle", DalleTask(cfg, CUDA, engine.module, []), engine, cfg.dalle_fit, cfg, tmp_path)
        with mock.patch.object(made._saver._thread, "submit", mock.Mock()):
            assert waits_of_updates(made, watch, 1) == [MESSAGE]
            made._saver.save(1, engine.fragments(to_load=False), {})
            assert waits_of_updates(made, watch, 1) == [MESSAGE]
        assert engine.updates == 2 and is_cuda(engine._masters())


@pytest.mark.parametrize("moments", ["fp32", "16-bit"])
def test_an_update_by_muon_waits_no_more_and_keeps_matrices_on_the_gpu(tmp_path: Path, moments: str) -> None:
    cfg = tiny("dalle_fit.optimizer=muon", f"dalle_fit.moments={moments}", "dalle_fit.precision=fp16", "zero.stage=3", "zero.weights=fp16")
    made_of: list[Tensor] = []
    plain = muon.update_of

    def seen(direction: Tensor) -> Tensor:
        made_of.append(plain(direction))
        return made_of[-1]

    with fake_cuda(MESSAGE) as watch, sharded(watch, cfg) as engine, mock.patch.object(muon, "update_of", seen):
        made = trainer("dalle", DalleTask(cfg, CUDA, engine.module, []), engine, cfg.dalle_fit, cfg, tmp_path)
        assert waits_of_updates(made, watch) == [MESSAGE] * 2
        assert len(made_of) == 2 * 6 * cfg.dalle.layers and is_cuda(made_of) and {t.dtype for t in made_of} == {torch.bfloat16}
        states = {name: f.tensor for name, f in engine.fragments(to_load=False).items() if name.startswith("optimizer/momentum/")}
        assert len(states) == 6 * cfg.dalle.layers and is_cuda(list(states.values()))


def test_an_update_that_contrasts_captions_waits_once_too_and_copies_frozen_weights_without_a_wait(tmp_path: Path) -> None:
    cfg = tiny("dalle_fit.objective=caption_contrast", "dalle_fit.init_from=export", "dalle_fit.precision=fp16", "zero.stage=3", "zero.weights=fp16")
    with fake_cuda(MESSAGE) as watch, sharded(watch, cfg) as engine:
        task = ContrastTask(cfg, CUDA, engine.module, [], World.single())
        made = trainer("dalle", task, engine, cfg.dalle_fit, cfg, tmp_path)
        made.loader = Batches(batch_of(cfg) | {"caption_keys": torch.tensor([1, 1, 0, 2]), "own_keys": [[1], [1], [2], [2]]})
        assert waits_of_updates(made, watch, 2) == [MESSAGE] * 2
        frozen = [fragment.tensor for name, fragment in engine.fragments(to_load=False).items() if name.startswith("frozen/")]
        assert engine.updates == 2 and is_cuda(engine._masters()) and frozen and not is_cuda(frozen)


def test_an_evaluation_of_the_transformer_reads_its_sums_once(tmp_path: Path) -> None:
    cfg = tiny("dalle_fit.precision=fp16", "zero.stage=3")
    task_file = "train/stages/dalle_task.py"
    with fake_cuda(task_file) as watch, sharded(watch, cfg) as engine:
        task = DalleTask(cfg, CUDA, engine.module, [batch_of(cfg), batch_of(cfg, 2)])
        with mock.patch.object(engine, "_swap", lambda: None), pytest.raises(ZeroDivisionError):  # sums without values
            task.evaluate(engine, 1, mock.Mock())
        assert [wait.place.partition(":")[0] for wait in watch.waits] == [task_file]
        with watch.setting_up():
            engine._swap()
        assert is_cuda(engine._masters()) and not is_cuda(list(engine.average.values.values()))


def test_an_update_of_the_dvae_waits_once_for_the_step_s_message(tmp_path: Path) -> None:
    cfg = tiny()
    with fake_cuda(MESSAGE) as watch:
        with watch.setting_up():
            engine = ReplicatedEngine(
                DVAE(cfg.dvae, torch.float16).to(CUDA),
                World.single(),
                betas=(0.9, 0.999),
                weight_decay=0.1,
                ema=0.9,
                clip_norm=1.0,
                loss_scale=LossScale(),
            )
            made = trainer("dvae", DvaeTask(cfg, RunFolder(str(tmp_path)), World.single(), CUDA, []), engine, cfg.dvae_fit, cfg, tmp_path)  # type: ignore[arg-type]
        assert waits_of_updates(made, watch) == [MESSAGE] * 2
        assert engine.updates == 2


def test_an_evaluation_of_the_dvae_reads_its_sums_and_its_counts_once(tmp_path: Path) -> None:
    cfg = tiny()
    files = ("train/evaluation/reconstruction.py", "train/evaluation/codes.py")
    with fake_cuda(*files) as watch:
        with watch.setting_up():
            engine = ReplicatedEngine(DVAE(cfg.dvae).to(CUDA), World.single(), betas=(0.9, 0.999), weight_decay=0.1, ema=0.9)
            task = DvaeTask(cfg, RunFolder(str(tmp_path)), World.single(), CUDA, [batch_of(cfg)] * 5)  # type: ignore[arg-type]
        with mock.patch("train.stages.dvae_task.show"), mock.patch.object(task, "_codes_of_training", dict):
            task.evaluate(engine, 1, mock.Mock())
    assert tuple(wait.place.partition(":")[0] for wait in watch.waits) == files  # once each, however many batches there were


def test_an_update_of_clip_waits_once_for_the_step_s_message(tmp_path: Path) -> None:
    cfg = tiny()
    with fake_cuda(MESSAGE) as watch:
        with watch.setting_up():
            clip = Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)
            towers = BothTowers(clip).to(CUDA)
            engine = ReplicatedEngine(towers, World.single(), betas=(0.9, 0.98), weight_decay=0.1, ema=0.9, after_step=clip.limit_scale)
            task = ClipTask(cfg, World.single(), CUDA, [batch_of(cfg)])
            made = trainer("clip", task, engine, cfg.clip_fit, cfg, tmp_path)
        assert waits_of_updates(made, watch) == [MESSAGE] * 2
        watch.may_wait = ("train/stages/clip_task.py",)
        before = len(watch.waits)
        with pytest.raises(ZeroDivisionError):  # sums without values
            task.evaluate(engine, 1, mock.Mock())
        assert len(watch.waits) == before + 1


def test_a_wait_that_somebody_plants_in_an_update_is_named(tmp_path: Path) -> None:
    cfg = tiny()

    class Looking(ClipTask):
        def loss(self, *args: Any) -> Any:
            found = super().loss(*args)
            if float(found.total) < 0:
                raise AssertionError
            return found

    with fake_cuda(MESSAGE) as watch:
        with watch.setting_up():
            towers = BothTowers(Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab)).to(CUDA)
            engine = ReplicatedEngine(towers, World.single(), betas=(0.9, 0.98), weight_decay=0.1, ema=0.9)
            made = trainer("clip", Looking(cfg, World.single(), CUDA, []), engine, cfg.clip_fit, cfg, tmp_path)
        with pytest.raises(HostWait, match=r"test_fake_cuda_updates.py:\d+: aten._local_scalar_dense.default waits for the GPU"):
            made._update(0, 0.0)
