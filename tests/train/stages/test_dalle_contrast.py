"""The caption-contrastive objective of stage dalle: its gradient against the formula, ranks and ZeRO stages, the captions it takes, a resume, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.loading.loaders import code_collate
from data_pipeline.loading.transforms import caption_key, code_transform
from infra.errors import ConfigError
from model.config import TransformerConfig
from tests.support.ranks import run_in_ranks
from tests.system.test_training import copy_of, fingerprint, losses
from tests.train.engines.zero_cases import BATCH, Case, make_model
from tests.train.stages.contrast_runs import CASES, by_hand, on_one, on_two, pairs_of, stopped_and_resumed, update_of
from tests.train.stages.test_caption_dropout import TOKENIZER, record
from train.config import RunConfig, load_run
from train.run.inputs import build_dalle
from train.stages import dalle_contrast, dalle_init_from, dalle_negatives, dalle_temperature
from train.weights import export

CONTRAST = ["dalle_fit.objective=caption_contrast", "dalle_fit.init_from=/some/export"]
TOLERANCE = {"fp32": 5e-6, "fp16": 5e-3}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    """Everything that is measured on two processes, which are dear to start."""
    return run_in_ranks(on_two, 2)


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_in_ranks(on_one, 1)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradient_are_those_of_the_formula_on_every_stage(two: Any, case: Case) -> None:
    found, right = two[0]["cases"][str(case)], by_hand(0)[0]
    assert found["gradient"] < TOLERANCE[case.precision]
    bound = TOLERANCE[case.precision]
    assert {name: found["logged"][0][name] for name in right} == pytest.approx(right, rel=bound, abs=bound)
    assert right["reward"] != pytest.approx(right["reward_other"], rel=1e-2) and 0 < right["reward_accuracy"] < 1


def test_two_ranks_and_one_make_the_same_updates_on_every_stage(two: Any, one: Any) -> None:
    for rank in two:
        for case in CASES:
            apart = 5e-5 if case.precision == "fp32" else 2e-2
            for ours, theirs in zip(rank["cases"][str(case)]["logged"], one["alone"]["logged"], strict=True):
                assert ours == pytest.approx(theirs, rel=apart, abs=apart), case
    assert one["alone"]["logged"][2]["loss"] < one["alone"]["logged"][0]["loss"], "updates are applied"


def test_frozen_passes_use_the_frozen_weights_and_leave_no_trace(two: Any, one: Any) -> None:
    for found in (*two[0]["cases"].values(), *two[1]["cases"].values(), one["alone"]):
        assert found["frozen"] < 5e-3 < found["moved"] and found["same"] and found["kept"]


def test_compressed_between_machines_the_first_losses_are_the_same_and_later_ones_close(two: Any, one: Any) -> None:
    ours, theirs = two[0]["compressed"], one["alone"]["logged"]
    assert ours["logged"][0]["loss"] == pytest.approx(theirs[0]["loss"], rel=5e-3) and ours["same"] and ours["kept"]
    assert ours["logged"][2]["loss"] == pytest.approx(theirs[2]["loss"], rel=5e-2)


def test_pictures_get_the_same_other_captions_on_any_number_of_ranks_and_micro_batches(two: Any, one: Any) -> None:
    whole = update_of(0)
    right = {}
    for row, other in enumerate(pairs_of(whole)):
        right[str(row)] = (whole["text"][other].tolist(), int(whole["lengths"][other]), float(other != row))
    assert one["chosen"] == right
    for split in range(2):
        assert two[0]["chosen"][split] | two[1]["chosen"][split] == right
    assert sum(has for _, _, has in right.values()) == BATCH - 3 and len({str(text) for text, _, _ in right.values()}) > BATCH / 3


@settings(max_examples=50, deadline=None)
@given(keys=st.lists(st.integers(0, 4), min_size=1, max_size=9), own=st.lists(st.integers(1, 4), max_size=2), place=st.integers(0, 8))
def test_another_caption_is_never_dropped_nor_one_of_the_picture_s_own(keys: list[int], own: list[int], place: int) -> None:
    place %= len(keys)
    mine = {keys[place], *own}
    found = dalle_negatives.following(keys, place, sorted(mine))
    allowed = [key for key in keys if key and key not in mine]
    if found == place:
        assert not keys[place] or not allowed
    else:
        assert keys[found] in allowed


def test_captions_that_a_model_cannot_tell_apart_have_one_key_whatever_was_dropped_of_their_merges() -> None:
    assert caption_key(TOKENIZER, "A red Apple") == caption_key(TOKENIZER, "a red apple") != caption_key(TOKENIZER, "an apple")
    long = "the redder of two apples " * 4
    assert caption_key(TOKENIZER, long + "red") == caption_key(TOKENIZER, long) != 0 and caption_key(TOKENIZER, "") == 0
    keyed = code_transform(TOKENIZER, 3, dropout=0.5, caption_dropout=0.3, caption_keys=True)
    plain = code_transform(TOKENIZER, 3, dropout=0.5, caption_dropout=0.3)
    samples = [keyed(record(number), number % 3) for number in range(40)]
    assert all(np.array_equal(plain(record(number), number % 3)[name], samples[number][name]) for number in range(40) for name in ("text", "codes"))
    own = [caption_key(TOKENIZER, caption) for caption in record(0)["captions"]]
    assert all(sample["own_keys"] == own and (sample["caption_key"] in own) == (sample["length"] > 0) for sample in samples)
    assert {sample["caption_key"] for sample in samples} == {0, *own}
    chosen = [next(at for at in range(2) if own[at] == sample["caption_key"]) for sample in samples if sample["length"]]
    undropped = [code_transform(TOKENIZER, 3)(record(number), number % 3)["text"] for number in range(40) if samples[number]["length"]]
    texts = [TOKENIZER.encode(caption)[0] for caption in record(0)["captions"]]
    assert all(np.array_equal(texts[at], text) for at, text in zip(chosen, undropped, strict=True)), "the key of the caption that was drawn"


def test_all_is_off_by_default_and_then_neither_batches_nor_checkpoints_have_more(one: Any) -> None:
    assert not RunConfig().dalle_fit.contrasts
    assert set(code_collate([code_transform(TOKENIZER, 0)(record(0), 0)])) == {"ids", "codes", "text", "lengths"}
    plain, contrasting = one["kinds"]
    assert plain == {"model", "optimizer", "average"} and contrasting == plain | {"frozen"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (CONTRAST[:1], r"dalle_fit: objective = 'caption_contrast' needs init_from: .*dalle_fit.init_from=runs/mine/dalle/export, or run 'launcher.py align runs/mine' in the run itself"),
        ([*CONTRAST, "dalle_fit.batch=1"], r"another picture's caption out of the same update, and batch = 1; set batch = 2 or more"),
        ([*CONTRAST, "dalle_fit.z_loss=1e-4"], r"cannot have z_loss = 0\.0001: .*; set z_loss = 0"),
        ([*CONTRAST, "dalle_fit.replace_codes=0.1"], r"set replace_codes = 0 and replace_pieces = 0, which would change what the model reads"),
        ([*CONTRAST, "dalle_fit.replace_pieces=0.1"], r"set replace_codes = 0 and replace_pieces = 0"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_combined_with_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_run("tiny", words)
    assert load_run("tiny", CONTRAST).dalle_fit.contrasts


@pytest.mark.parametrize(
    ("cfg", "parents", "said"),
    [
        (TransformerConfig(layers=2, heads=4), {}, "dalle.heads = 2 there, 4 here"),
        (TransformerConfig(layers=2, heads=2), {"dvae": "x" * 64}, "dvae xxxxxxxxxxxx there, dddddddddddd here"),
        (TransformerConfig(layers=2, heads=2), {"tokenizer": "y" * 64}, "tokenizer yyyyyyyyyyyy there, tttttttttttt here"),
    ],
)
def test_frozen_weights_that_were_trained_on_something_else_are_refused(tmp_path: Path, cfg: TransformerConfig, parents: Any, said: str) -> None:
    plain, mine = TransformerConfig(layers=2, heads=2), {"dvae": "d" * 64, "tokenizer": "t" * 64, "codes": "c" * 64}
    export.write(str(tmp_path), {"x": torch.zeros(1)}, plain, parents={"codes": "z" * 64} | parents)
    with pytest.raises(ConfigError, match=f"^dalle_fit.init_from = {tmp_path}: .*: {said}. Name the export"):
        dalle_init_from.refuse_another_language(str(tmp_path), cfg, mine, "dalle_fit.init_from")
    dalle_init_from.refuse_another_language(str(tmp_path), plain, mine | parents, "dalle_fit.init_from")


def test_a_model_gives_likelihoods_at_temperatures() -> None:
    model, whole = make_model(), update_of(0)
    inputs = (whole["text"], whole["lengths"], whole["codes"])
    with torch.no_grad():
        at_BIK = model(*inputs, temperatures=(1.0, 2.0))[1]
        logits_BIV = model.image_unembedding(model.predicting_states(*inputs)[1])
        right_BI = -(logits_BIV / 2).log_softmax(-1).gather(2, whole["codes"][..., None])[..., 0]
        assert torch.equal(at_BIK[..., 0], model(*inputs)[1])
    assert torch.allclose(at_BIK[..., 1], right_BI, atol=1e-5) and not torch.allclose(at_BIK[..., 0], right_BI, atol=1e-4)


def test_the_temperature_that_fits_is_found_and_the_caption_gain_there() -> None:
    """Logits that are 1.4 times too large; a wrong caption costs 0.3 nats of them."""
    generator = torch.Generator().manual_seed(0)
    logits_IV = torch.randn(2000, 6, generator=generator)
    codes_BI = torch.multinomial(logits_IV.softmax(1), 2, replacement=True, generator=generator).T.contiguous()

    def model(text_BT: torch.Tensor, lengths_B: torch.Tensor, codes_BI: torch.Tensor, temperatures: Any) -> tuple[torch.Tensor, torch.Tensor]:
        wrong_B = (text_BT[:, 0] != codes_BI[:, 0]).float()
        found = [-(1.4 * logits_IV / t).log_softmax(1).gather(1, codes_BI.T).T + 0.3 * wrong_B[:, None] / t for t in temperatures]
        return text_BT, torch.stack(found, 2)

    codes_BI[:, 0] = torch.tensor([1, 2])
    batch = {"ids": ["a", "b"], "text": codes_BI[:, :1], "lengths": torch.ones(2, dtype=torch.int64), "codes": codes_BI}
    found = dalle_temperature.fitted(model, [batch], torch.device("cpu"))
    right = -logits_IV.log_softmax(1).gather(1, codes_BI.T).mean()
    assert found == {"temperature": 1.4, "fitted_loss_image": pytest.approx(float(right), rel=1e-5), "fitted_caption_gain": pytest.approx(0.3 / 1.4)}


def test_an_evaluation_says_what_was_before_and_is_after(two: Any) -> None:
    first, second = two[0]["evaluated"]
    names = ("temperature", "fitted_loss_image", "fitted_caption_gain")
    assert all(first[name] == first[f"frozen_{name}"] == second[f"frozen_{name}"] for name in names), "no update has been made at first"
    assert second["fitted_loss_image"] != first["fitted_loss_image"] and two[1]["evaluated"] == two[0]["evaluated"]
    assert first["fitted_loss_image"] <= first["loss_image"]
    given = {"fitted_loss_image": 1.625, "fitted_caption_gain": 0.125, "temperature": 1.1}
    given |= {"frozen_fitted_loss_image": 1.5, "frozen_fitted_caption_gain": 0.0625, "frozen_temperature": 1.0}
    assert dalle_contrast.described(given).splitlines() == [
        "caption contrast, on validation       before     after    change",
        "nats per code, own caption            1.5000    1.6250   +0.1250",
        "caption gain, nats per code           0.0625    0.1250   +0.0625",
        "at the temperature that fits            1.00      1.10     +0.10",
    ]


def test_a_stopped_run_resumes_bit_for_bit_although_its_start_is_gone(prepared: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    changes: dict[str, Any] = {"dalle_fit.objective": "caption_contrast", "dalle_fit.init_from": str(start), "dalle_fit.accumulation": 2}
    changes |= {"dalle.layers": 2, "dalle_fit.precision": "fp32", "dalle_fit.steps": 10, "dalle_fit.caption_dropout": 0.0}
    whole, broken = (copy_of(prepared, tmp_path / name, changes=changes) for name in ("whole", "broken"))
    cfg = load_run(str(whole / "tiny"), [])
    torch.manual_seed(5)
    export.write(str(start), build_dalle(cfg, torch.device("cpu"), torch.float32, "dense").state_dict(), cfg.dalle)
    ((said, stopped),) = run_in_ranks(stopped_and_resumed, 1, str(whole), str(broken), str(start))
    assert "caption contrast, on validation       before     after    change" in said and "stopped by a signal after update 4 of 10; saved" in stopped
    assert losses(broken, "dalle") == losses(whole, "dalle") and fingerprint(broken, "dalle") == fingerprint(whole, "dalle")
    assert losses(whole, "dalle")[0] == pytest.approx(2 * np.log(2), rel=1e-6), "the model begins as the frozen one"
    assert len(set(losses(whole, "dalle"))) == 10
