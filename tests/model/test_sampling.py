"""Drawn pictures follow the model, the seed, and nothing else."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from model.captured import PASSES_BEFORE
from model.decoder import DrawingWeights, Texts
from model.gumbel import gumbel_noise
from model.sampling import Drawn, NotFiniteError, Rule, Sampling, begin, sample
from model.transformer import Transformer
from tests.model.test_decoder import LENGTHS, TEXT, build
from tests.support.logits import logits
from tests.support.recorded_graph import NotRecordableError, record


def wide(**options: Any) -> Transformer:
    model = build(**options)
    model.image_unembedding.weight.mul_(3)
    return model


def draw(seeds: Sequence[int], rule: Rule = Rule(), captions: slice = slice(None), model: Transformer | None = None, **options: Any) -> Drawn:  # noqa: B008
    return sample(DrawingWeights(model or wide()), TEXT[captions], LENGTHS[captions], seeds, rule, **options)


def test_a_picture_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    together_BI = draw([5, 6, 7, 8]).codes_BI
    alone_BI = draw([7], captions=slice(2, 3)).codes_BI
    assert together_BI.shape == (4, 16)
    assert together_BI[2].equal(alone_BI[0])
    assert not together_BI[2].equal(draw([9], captions=slice(2, 3)).codes_BI[0])


def test_pictures_of_one_caption_are_those_that_are_drawn_alone() -> None:
    together_BI = draw([1, 2, 3, 4, 5, 6], captions=slice(0, 2)).codes_BI
    assert together_BI[:3].equal(draw([1, 2, 3], captions=slice(0, 1)).codes_BI)
    assert together_BI[5:].equal(draw([6], captions=slice(1, 2)).codes_BI)


def test_given_codes_are_kept_and_the_rest_is_drawn_as_if_they_had_been_drawn() -> None:
    whole_BI = draw([1, 2, 3, 4]).codes_BI
    for given in (1, 7, 16):
        assert draw([1, 2, 3, 4], prefix_BP=whole_BI[:, :given]).codes_BI.equal(whole_BI)
        assert draw([1, 2, 3, 4], prefix_BP=whole_BI[:, :given], window=3).codes_BI.equal(whole_BI)
    other_BI = (whole_BI[:, :7] + 1) % 24
    drawn_BI = draw([1, 2, 3, 4], prefix_BP=other_BI).codes_BI
    assert drawn_BI[:, :7].equal(other_BI)
    assert not drawn_BI[:, 7:].equal(whole_BI[:, 7:])


@pytest.mark.parametrize("rule", [Rule(), Rule(guidance=3.0), Rule(temperature=0.7, top_k=5), Rule(top_p=0.8, guidance=1.5)])
@pytest.mark.parametrize("masks", [{"layers": 6}, {"layers": 3, "conv_offsets": "causal"}, {"layers": 1, "conv_kernel": 7}])
def test_windows_of_drafts_give_the_very_codes_that_come_one_at_a_time(masks: dict[str, Any], rule: Rule) -> None:
    model = wide(**masks)
    alone = draw([1, 2, 3, 4, 5, 6, 7, 8], rule, model=model)
    assert alone.passes == 16
    for window in (2, 3, 4):
        drafted = draw([1, 2, 3, 4, 5, 6, 7, 8], rule, model=model, window=window)
        assert drafted.codes_BI.equal(alone.codes_BI)
        assert drafted.passes <= 16


@pytest.mark.parametrize("rule", [Rule(), Rule(guidance=3.0)])
@pytest.mark.parametrize("window", [1, 3, 4])
@torch.no_grad()
def test_pictures_that_go_on_from_others_are_those_that_are_drawn_from_their_codes(window: int, rule: Rule) -> None:
    """A drawing that pauses at a position, where some pictures wait for others, and goes on from other pictures with other seeds."""
    model, seeds, later = wide(layers=6, conv_kernel=3), list(range(1, 9)), list(range(21, 29))
    weights = DrawingWeights(model)
    for end in (4, 8, 11):
        run = begin(weights, TEXT, LENGTHS, seeds, rule, window=window)
        run.run_to(end)
        half_BI = run.codes_BI[:, :end].clone()
        assert half_BI.equal(draw(seeds, rule, model=model).codes_BI[:, :end]) and run.known_B.tolist() == [end] * 8
        index_B = torch.tensor([1, 1, 2, 3, 4, 4, 7, 6])  # two pictures of each caption
        run.select(index_B, later)
        run.run_to(run.total)
        assert run.codes_BI.equal(draw(later, rule, model=model, prefix_BP=half_BI[index_B]).codes_BI)


def recorded(model: Transformer, seeds: Sequence[int], rule: Rule, prefix_BP: torch.Tensor | None, window: int) -> Sampling:
    """A drawing whose passes are recorded, by a stand-in of CUDA graphs."""
    texts = [Texts(TEXT, LENGTHS, len(seeds) // len(TEXT))]
    if rule.guidance != 1:
        texts.append(Texts(torch.zeros_like(TEXT[:1]), torch.zeros_like(LENGTHS[:1]), len(seeds)))
    with torch.no_grad():
        return Sampling(DrawingWeights(model).drawer(texts), rule, torch.tensor(seeds), prefix_BP, window, record)


@pytest.mark.parametrize("rule", [Rule(), Rule(temperature=0.7, top_k=5, top_p=0.8, guidance=1.5)])
@pytest.mark.parametrize("masks", [{"layers": 6}, {"layers": 3, "conv_offsets": "causal", "qk_norm": True, "rotary_positions": True}])
@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_passes_that_were_recorded_once_give_the_codes_of_passes_that_run_one_by_one(window: int, masks: dict[str, Any], rule: Rule) -> None:
    model, seeds = wide(**masks), [1, 2, 3, 4, 5, 6, 7, 8]
    alone_BI = draw(seeds, rule, model=model).codes_BI
    for prefix_BP in (None, alone_BI[:, :2]):
        run = recorded(model, seeds, rule, prefix_BP, window)
        while not run.is_done:
            run.step()
        assert run.codes_BI.equal(alone_BI) and run.passes > PASSES_BEFORE
    plain, run = begin(DrawingWeights(model), TEXT, LENGTHS, seeds, rule, window=window), recorded(model, seeds, rule, None, window)
    for one in (plain, run):  # also where others take the place of some
        one.run_to(10)
        one.select(torch.tensor([1, 1, 2, 3, 5, 4, 6, 6]), range(20, 28))
        one.run_to(one.total)
    assert run.codes_BI.equal(plain.codes_BI)


@torch.no_grad()
def test_a_recorded_drawing_names_the_first_position_whose_logits_are_no_numbers_and_one_that_cannot_be_recorded_goes_on() -> None:
    model = wide()
    model.image_rows.weight[1] = float("nan")
    run = recorded(model, [1, 2, 3, 4], Rule(), None, 1)
    with pytest.raises(NotFiniteError, match="position 5 of 16"):
        run.run_to(16)
    assert run.least == 8  # it looks at the end of a row
    with pytest.raises(NotRecordableError):
        record(lambda: run._refuse_no_numbers())
    run = recorded(model := wide(), [1, 2, 3, 4], Rule(), None, 1)
    run._capture = lambda work: None
    run.run_to(16)
    assert run.codes_BI.equal(draw([1, 2, 3, 4], model=model).codes_BI)


def test_drafts_that_are_right_save_passes() -> None:
    """A model that is nearly sure of one code: from the second row on the drafts, the codes above, are right."""
    model = wide()
    model.image_unembedding.weight.mul_(0)
    model.image_unembedding.weight[7] = 100 * model.final_norm.weight.sign()  # type: ignore[union-attr]
    model.final_norm.bias.fill_(1.0)  # type: ignore[union-attr, operator]
    drawn = draw([1, 2, 3, 4], model=model, window=4)
    assert drawn.codes_BI.unique().tolist() == [7]
    assert drawn.passes <= 7


def test_the_noise_is_a_function_of_seed_position_and_code() -> None:
    seeds_B, states_BQ = torch.tensor([3, 2**62 + 1]), torch.tensor([[0, 1, 2], [5, 6, 1023]])
    noise_BQN = gumbel_noise(seeds_B, states_BQ, 50)
    assert gumbel_noise(seeds_B[1:], states_BQ[1:, 2:], 50).equal(noise_BQN[1:, 2:])
    assert gumbel_noise(seeds_B, states_BQ, 30).equal(noise_BQN[..., :30])
    assert noise_BQN.unique().numel() == noise_BQN.numel()
    # By another implementation of splitmix64, in Python's own integers.
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    bits = mix((mix(3) + ((2 << 32) + 17 + 1) * 0x9E3779B97F4A7C15) & mask) >> 11
    expected = -torch.tensor((bits + 0.5) / 2**53, dtype=torch.float64).neg().log1p().neg().log()
    torch.testing.assert_close(noise_BQN[0, 2, 17].double(), expected, rtol=1e-6, atol=1e-6)


def test_the_noise_has_gumbels_distribution_along_seeds_positions_and_codes() -> None:
    """The largest distance of the distribution functions (Kolmogorov); seeds that follow one another, as people choose them."""
    many = 40_000
    axes = {
        "seeds": gumbel_noise(torch.arange(many), torch.zeros(many, 1, dtype=torch.int64), 1),
        "positions": gumbel_noise(torch.tensor([1]), torch.arange(many)[None], 1),
        "codes": gumbel_noise(torch.tensor([1]), torch.tensor([[0]]), many),
    }
    rank = (torch.arange(many) + 0.5) / many
    for name, noise in axes.items():
        assert bool(noise.isfinite().all())
        distribution = (-(-noise.flatten().double().sort().values).exp()).exp()
        assert float((distribution - rank).abs().max()) < 1.63 / many**0.5, name  # exceeded once in a hundred


def chi_square(rule: Rule, window: int) -> tuple[float, int]:
    """Of the last code of 4,000 pictures that share all before it, against the probabilities that the whole-stream model gives; degrees of freedom."""
    model, many = wide(), 4000
    given_BP = torch.full((many, 15), 3)
    drawn_B = draw(range(many), rule, slice(0, 1), model, prefix_BP=given_BP, window=window).codes_BI[:, -1]
    stream = torch.full((1, 16), 3)
    caption_N = logits(model, TEXT[:1], LENGTHS[:1], stream)[1][0, -1]
    empty_N = logits(model, torch.zeros_like(TEXT[:1]), torch.zeros_like(LENGTHS[:1]), stream)[1][0, -1]
    logits_N = (empty_N + rule.guidance * (caption_N - empty_N)) / rule.temperature
    p_N = logits_N.softmax(0)
    order_N = p_N.argsort(descending=True)
    allowed = order_N[: rule.top_k]
    if rule.top_p is not None:
        kept, mass = [], 0.0
        for code in allowed.tolist():
            kept.append(code)
            mass += float(p_N[code] / p_N[allowed].sum())
            if mass >= rule.top_p:
                break
        allowed = torch.tensor(kept)
    wanted_N = torch.zeros_like(p_N).index_copy(0, allowed, p_N[allowed] / p_N[allowed].sum()) * many
    found_N = drawn_B.bincount(minlength=24)
    assert int(found_N[wanted_N == 0].sum()) == 0
    is_counted = wanted_N > 5
    return float(((found_N - wanted_N) ** 2 / wanted_N)[is_counted].sum()), int(is_counted.sum()) - 1


@pytest.mark.parametrize(
    ("rule", "window"),
    [
        (Rule(temperature=3.0), 1),
        (Rule(temperature=3.0), 4),
        (Rule(temperature=3.0, guidance=2.5), 1),
        (Rule(temperature=3.0, top_k=4), 1),
        (Rule(temperature=3.0, top_p=0.6), 1),
        (Rule(temperature=3.0, top_k=10, top_p=0.8), 1),
    ],
)
def test_codes_are_drawn_in_proportion_to_their_probabilities(rule: Rule, window: int) -> None:
    found, freedom = chi_square(rule, window)
    assert freedom >= 2
    assert found < freedom + 3.1 * (2 * freedom) ** 0.5  # about one in a thousand


def test_top_k_of_one_is_the_likeliest_code_whatever_the_seed() -> None:
    greedy_BI = draw([1, 2, 3, 4], Rule(top_k=1)).codes_BI
    assert greedy_BI.equal(draw([9, 8, 7, 6], Rule(top_k=1)).codes_BI)
    assert greedy_BI.equal(logits(wide(), TEXT, LENGTHS, greedy_BI)[1].argmax(2))


def test_guidance_of_one_computes_nothing_and_of_zero_forgets_the_caption() -> None:
    model = wide()
    assert draw([1, 2, 3, 4], Rule(guidance=1.0)).codes_BI.equal(draw([1, 2, 3, 4]).codes_BI)
    without_BI = sample(DrawingWeights(model), torch.zeros_like(TEXT), torch.zeros_like(LENGTHS), [1, 2, 3, 4]).codes_BI
    assert draw([1, 2, 3, 4], Rule(guidance=0.0), model=model).codes_BI.equal(without_BI)


@pytest.mark.parametrize(("window", "place"), [(1, "position 3"), (3, "positions (1|2|3) to (3|4|5)")])
def test_logits_that_are_no_numbers_end_the_drawing_and_name_the_position(window: int, place: str) -> None:
    model = wide(layers=1)
    model.image_columns.weight[2] = float("nan")
    with pytest.raises(NotFiniteError, match=f"the logits of image {place} of 16 are not finite"):
        draw([1, 2, 3, 4], model=model, window=window)


def test_a_listener_sees_the_codes_so_far_and_may_end_the_drawing() -> None:
    seen: list[list[int]] = []

    def listen(codes_BI: torch.Tensor, known_B: torch.Tensor) -> None:
        assert codes_BI.shape == (4, 16)
        seen.append(known_B.tolist())
        if len(seen) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        draw([1, 2, 3, 4], after_pass=listen)
    assert seen == [[1] * 4, [2] * 4, [3] * 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1, 2, 3, 4, 5]}, "5 seeds for 4 captions"),
        ({"seeds": []}, "0 seeds for 4 captions"),
        ({"rule": Rule(temperature=0.0)}, "temperature = 0.0: must be above 0"),
        ({"rule": Rule(temperature=float("nan"))}, "temperature = nan: must be above 0"),
        ({"rule": Rule(top_k=25)}, "top_k = 25: accepted are 1 to dvae.vocab = 24"),
        ({"rule": Rule(top_p=0.0)}, "top_p = 0.0: accepted are numbers above 0 and up to 1"),
        ({"rule": Rule(guidance=-1.0)}, "guidance = -1.0: accepted are numbers from 0"),
        ({"window": 5}, "window = 5: accepted are 1 to 4, a row of codes"),
        ({"lengths": torch.tensor([3, 0, 6, 2])}, r"lengths \[3, 0, 6, 2\] of 4 captions: expected one for each, 0 to 5"),
        ({"lengths": torch.tensor([3, 0, -1, 2])}, r"lengths \[3, 0, -1, 2\] of 4 captions"),
        ({"text": TEXT[:, :4]}, r"text has shape \(4, 4\): expected \[captions, 5\]"),
        ({"prefix_BP": torch.zeros(4, 17, dtype=torch.long)}, r"prefix codes have shape \(4, 17\): expected \[4, at most 16\]"),
        ({"prefix_BP": torch.zeros(3, 2, dtype=torch.long)}, r"prefix codes have shape \(3, 2\)"),
        ({"prefix_BP": torch.full((4, 2), 24)}, "prefix codes reach from 24 to 24: accepted are 0 to 23"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"text": TEXT, "lengths": LENGTHS, "seeds": [1, 2, 3, 4]} | options
    text_CT, lengths_C, seeds = (given.pop(name) for name in ("text", "lengths", "seeds"))
    with pytest.raises(ValueError, match=message):
        sample(DrawingWeights(build()), text_CT, lengths_C, seeds, **given)
