"""Options of training on few pictures: what is replaced, that it can be drawn again, what reaches the model, and that all of it is off by default."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loaders import code_collate
from data_pipeline.loading.transforms import code_transform
from infra.errors import ExitCode
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer
from tests.system.test_training import StopAfter, copy_of, fingerprint, losses, run_stage
from tests.train.stages.test_caption_dropout import TOKENIZER, record
from train import launch
from train.config import DalleFit, RunConfig
from train.config_learning import LearningSection
from train.engines.protocol import Engine
from train.stages import dalle_init_from
from train.stages.dalle_task import DalleTask
from train.weights import export

OPTIONS = {
    "dalle_fit.replace_codes": 0.2,
    "dalle_fit.replace_pieces": 0.1,
    "dalle_fit.z_loss": 1e-3,
    "dalle_fit.logits": "bf16",
    "dalle.zero_projections": True,
    "dalle.qk_norm": True,
    "dalle.rotary_positions": True,
    "dalle.base_width": 8,
    "dalle.base_heads": 1,
    "dalle_fit.optimizer": "muon",
}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), share=st.sampled_from([0.1, 0.5]))
def test_the_asked_share_of_codes_and_pieces_is_replaced_by_seed_epoch_and_id_and_no_target(seed: int, epoch: int, share: float) -> None:
    vocab = 64
    noisy = code_transform(TOKENIZER, seed, replace_codes=share, replace_pieces=share / 2, vocab=vocab)
    plain = code_transform(TOKENIZER, seed, vocab=vocab)
    codes, pieces = [], []
    for number in range(300):
        sample, again, kept = (function(record(number), epoch) for function in (noisy, noisy, plain))
        assert all(np.array_equal(sample[name], again[name]) for name in sample)
        assert all(np.array_equal(sample[name], kept[name]) for name in kept), "what is predicted stays as it is"
        codes.append(sample["read_codes"] != sample["codes"])
        pieces.append((sample["read_text"] != sample["text"])[: sample["length"]])
        assert sample["read_codes"].min() >= 0 and sample["read_codes"].max() < vocab
        assert sample["read_text"][: sample["length"]].min() >= 2 and sample["read_text"].max() < TOKENIZER.size, "no padding and nothing unknown"
    for found, asked in ((np.concatenate(codes), share * (1 - 1 / vocab)), (np.concatenate(pieces), share / 2 * (1 - 1 / TOKENIZER.size))):
        assert abs(found.mean() - asked) < 5 * (asked * (1 - asked) / len(found)) ** 0.5
    this, following = (np.stack([noisy(record(number), at)["read_codes"] for number in range(50)]) for at in (epoch, epoch + 1))
    assert not np.array_equal(this, following), "drawn anew in each epoch"


def test_one_share_does_not_change_what_the_other_replaces() -> None:
    both, codes = (
        code_transform(TOKENIZER, 0, replace_codes=0.3, replace_pieces=0.3, vocab=64),
        code_transform(TOKENIZER, 0, replace_codes=0.3, vocab=64),
    )
    for number in range(20):
        one, other = both(record(number), 0), codes(record(number), 0)
        assert np.array_equal(one["read_codes"], other["read_codes"]) and np.array_equal(other["read_text"], other["text"])


def test_all_is_off_by_default_and_then_batches_are_as_they_were() -> None:
    assert not any(LearningSection().model_dump().values())
    plain = TransformerConfig()
    assert not any(getattr(plain, key.removeprefix("dalle.")) for key in OPTIONS if key.startswith("dalle."))
    batch = code_collate([code_transform(TOKENIZER, 0)(record(number), 0) for number in range(3)])
    assert set(batch) == {"ids", "codes", "text", "lengths"}


def test_the_model_reads_the_replaced_and_predicts_the_right_ones() -> None:
    shape = StreamShape(text_tokens=16, text_vocab=400, grid=4, image_vocab=64)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(layers=2, width=16, heads=2, conv_kernel=3), shape)
    task = DalleTask(RunConfig(dalle_fit=DalleFit(replace_codes=0.5)), torch.device("cpu"), model, [])
    noisy = code_transform(TOKENIZER, 0, replace_codes=0.5, replace_pieces=0.5, vocab=64)
    batch = code_collate([noisy(record(number), 0) for number in range(4)])
    loss = task.loss(cast(Engine, model), batch, 0, {}, task.denominators([batch]))
    read: Any = (batch["text"], batch["lengths"], batch["codes"], batch["read_text"], batch["read_codes"])
    by_hand = model(*read)
    assert loss.sums["loss_image"].item() == pytest.approx(by_hand[1].mean().item(), rel=1e-6)
    assert by_hand[1].mean().item() != pytest.approx(model(*read[:3])[1].mean().item(), rel=1e-4)


def test_weights_that_fit_and_were_trained_to_compute_something_else_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, other = TransformerConfig(layers=2, width=16, heads=2), TransformerConfig(layers=2, width=16, heads=4, rotary_positions=True)
    export.write(str(tmp_path), {"x": torch.zeros(1)}, plain)
    with caplog.at_level("WARNING"):
        dalle_init_from.say_differences(str(tmp_path), plain, "dalle_fit.init_from")
        assert not caplog.messages
        dalle_init_from.say_differences(str(tmp_path), other, "dalle_fit.init_from")
        dalle_init_from.say_differences(str(tmp_path), replace(plain, base_width=8), "dalle_fit.init_from")  # weights compute the same
    (said,) = caplog.messages
    assert said.startswith(f"dalle_fit.init_from = {tmp_path}: ") and said.endswith(
        "dalle.heads = 2 there, 4 here; dalle.rotary_positions = False there, True here"
    )


def test_a_run_with_all_options_resumes_bit_for_bit_and_learns_otherwise_than_one_without(prepared: Path, tmp_path: Path) -> None:
    whole, broken, plain = (
        copy_of(prepared, tmp_path / name, changes=options) for name, options in (("whole", OPTIONS), ("broken", OPTIONS), ("plain", {}))
    )
    words = [f"{key}={str(value).lower()}" for key, value in OPTIONS.items()]
    run_stage("dalle", str(whole), words)
    with pytest.raises(launch.StageFailed) as caught:
        run_stage("dalle", str(broken), words, StopAfter(4))
    assert caught.value.exit_code == ExitCode.REQUEUE
    run_stage("dalle", str(broken), words)
    assert losses(broken, "dalle") == losses(whole, "dalle") and fingerprint(broken, "dalle") == fingerprint(whole, "dalle")
    stored = export.describe(str(whole / "tiny" / "dalle" / "export"))["model"]
    assert {key: stored[key.removeprefix("dalle.")] for key in OPTIONS if key.startswith("dalle.")} == {
        k: v for k, v in OPTIONS.items() if k.startswith("dalle.")
    }
    run_stage("dalle", str(plain), [])
    assert all(one != other for one, other in zip(losses(plain, "dalle"), losses(whole, "dalle"), strict=True))
