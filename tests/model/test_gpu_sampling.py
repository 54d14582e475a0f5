"""Drawing on a GPU (``make gpu``): the codes that a CPU draws, one at a time and in windows, with and without guidance; passes recorded as a graph. Not yet seen there."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from model.captured import cuda_graph
from model.config import StreamShape, TransformerConfig
from model.decoder import DrawingWeights, Texts
from model.sampling import Rule, Sampling, begin, sample
from model.transformer import Transformer
from tests.support.gpu import CUDA_ALONE, DEVICE, NEEDS_GPU

pytestmark = NEEDS_GPU
SHAPE = StreamShape(text_tokens=8, text_vocab=50, grid=9, image_vocab=40)


@pytest.mark.parametrize("rule", [Rule(), Rule(temperature=0.7, top_k=9, guidance=2.0), Rule(top_p=0.8)])
def test_pictures_are_those_that_a_cpu_draws(rule: Rule) -> None:
    """In fp32; rounding may turn an argmax now and then, and then changes the rest of that picture."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = Transformer(TransformerConfig(layers=4, width=64, heads=4, conv_kernel=3), SHAPE).requires_grad_(False)
    model.image_unembedding.weight.mul_(3)
    text_CT, lengths_C, seeds = torch.randint(2, 50, (4, 8)), torch.tensor([3, 0, 8, 5]), list(range(16))
    expected_BI = sample(DrawingWeights(model), text_CT, lengths_C, seeds, rule).codes_BI
    weights = DrawingWeights(deepcopy(model).to(DEVICE))
    for window in (1, 4):
        found = sample(weights, text_CT.to(DEVICE), lengths_C.to(DEVICE), seeds, rule, window=window)
        same_B = (found.codes_BI.cpu() == expected_BI).all(1)
        assert int(same_B.sum()) >= 14, (window, same_B.tolist())


@CUDA_ALONE
@torch.no_grad()
@pytest.mark.parametrize("window", [1, 4])
def test_recorded_passes_draw_the_codes_of_passes_that_run_one_by_one(window: int) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = Transformer(TransformerConfig(layers=6, width=64, heads=4, conv_kernel=3), SHAPE).requires_grad_(False).to(DEVICE)
    model.image_unembedding.weight.mul_(3)
    weights, text_CT, lengths_C = DrawingWeights(model), torch.randint(2, 50, (2, 8), device=DEVICE), torch.tensor([3, 8], device=DEVICE)
    texts = [Texts(text_CT, lengths_C, 8)]
    drawn = []
    for capture in (cuda_graph, None):
        run = Sampling(weights.drawer(texts), Rule(top_k=9), torch.arange(16, device=DEVICE), None, window, capture)
        run.run_to(run.total)
        assert (run._replay is not None) == (capture is not None)
        drawn.append(run.codes_BI.cpu())
    assert int((drawn[0] == drawn[1]).all(1).sum()) >= 15  # one at a time, a pass may add up in another order


@torch.no_grad()
def test_pictures_that_go_on_from_others_are_those_that_a_cpu_draws() -> None:
    """As a search does: a pause at a position, and then other codes and seeds."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = Transformer(TransformerConfig(layers=4, width=64, heads=4, conv_kernel=3), SHAPE).requires_grad_(False)
    text_CT, lengths_C = torch.randint(2, 50, (1, 8)), torch.tensor([5])
    drawn = []
    for device in ("cpu", DEVICE):
        run = begin(
            DrawingWeights(deepcopy(model).to(device)), text_CT.to(device), lengths_C.to(device), list(range(8)), Rule(guidance=2.0), window=4
        )
        run.run_to(10)
        run.select(torch.tensor([0, 0, 2, 2, 4, 4, 6, 6], device=device), list(range(20, 28)))
        run.run_to(run.total)
        drawn.append(run.codes_BI.cpu())
    assert int((drawn[0] == drawn[1]).all(1).sum()) >= 6


def test_given_codes_stay_and_half_precision_draws_codes_that_are_in_range() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(layers=3, width=64, heads=4, conv_kernel=3), SHAPE).requires_grad_(False).to(DEVICE)
    given_BP = torch.randint(40, (3, 13), device=DEVICE)
    weights = DrawingWeights(model, torch.bfloat16)
    codes_BI = sample(
        weights, torch.zeros(1, 8, dtype=torch.int64, device=DEVICE), torch.tensor([4]).to(DEVICE), [1, 2, 3], prefix_BP=given_BP
    ).codes_BI
    assert codes_BI[:, :13].equal(given_BP) and int(codes_BI.min()) >= 0 and int(codes_BI.max()) < 40
