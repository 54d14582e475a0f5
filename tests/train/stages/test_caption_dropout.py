"""Caption dropout: seeded, counted, off by default, and never in what is stored."""

from __future__ import annotations

import copy
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.transforms import Record, code_transform
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer
from train.config import DalleFit, RunConfig
from train.engines.protocol import Engine
from train.ranks.signal_vector import SignalVector
from train.stages.dalle_task import DalleTask

TOKENIZER = Tokenizer(train_tokenizer(["a red apple", "an apple", "the redder of two apples"], 400), 16)


def record(number: int) -> Record:
    return {"id": f"picture-{number}", "captions": ["a red apple", "an apple"], "codes": np.arange(16, dtype=np.uint16)}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 50), share=st.sampled_from([0.1, 0.5]))
def test_the_asked_share_of_samples_loses_its_caption_by_seed_epoch_and_id(seed: int, epoch: int, share: float) -> None:
    transform, plain = code_transform(TOKENIZER, seed, caption_dropout=share), code_transform(TOKENIZER, seed)
    lost = []
    for number in range(400):
        sample, again, kept = (function(record(number), epoch) for function in (transform, transform, plain))
        lost.append(sample["length"] == 0)
        assert sample["text"].tolist() == again["text"].tolist()
        if lost[-1]:
            assert not sample["text"].any() and sample["text"].shape == kept["text"].shape
        else:
            assert sample["text"].tolist() == kept["text"].tolist() and sample["length"] == kept["length"]
        assert sample["codes"].tolist() == kept["codes"].tolist()
    assert abs(np.mean(lost) - share) < 5 * (share * (1 - share) / 400) ** 0.5
    next_epoch = [transform(record(number), epoch + 1)["length"] == 0 for number in range(400)]
    assert next_epoch != lost, "drawn anew in each epoch"


def test_it_is_off_by_default_and_leaves_records_alone() -> None:
    assert DalleFit().caption_dropout == 0
    stored = record(3)
    before = copy.deepcopy(stored)
    drop = code_transform(TOKENIZER, 0, caption_dropout=0.99)
    assert all(drop(stored, epoch)["length"] == 0 for epoch in range(3))
    assert stored["captions"] == before["captions"] and stored["codes"].tolist() == before["codes"].tolist()
    assert all(code_transform(TOKENIZER, 0)(record(n), 0)["length"] > 0 for n in range(50))


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_captions_that_were_dropped_are_counted_in_the_metrics(share: float) -> None:
    cfg = RunConfig(dalle_fit=DalleFit(caption_dropout=share))
    shape = StreamShape(text_tokens=5, text_vocab=40, grid=4, image_vocab=24)
    model = Transformer(TransformerConfig(layers=2, width=16, heads=2, conv_kernel=3), shape)
    task = DalleTask(cfg, torch.device("cpu"), model, [])
    batch: dict[str, Any] = {
        "text": torch.zeros(4, 5, dtype=torch.long),
        "lengths": torch.tensor([0, 3, 0, 5]),
        "codes": torch.zeros(4, 16, dtype=torch.long),
    }
    loss = task.loss(cast(Engine, model), batch, 0, {}, task.denominators([batch]))
    assert set(loss.sums) == set(task.metrics)
    agreed = SignalVector(task.metrics, torch.device("cpu")).exchange(loss.sums)
    assert agreed.get("captions_dropped") == (2.0 if share else None)
