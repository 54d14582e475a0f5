"""The benchmark of drawing: its floors are sums that can be done by hand, and it runs. Seconds: about 3."""

import json

import torch

from model.config import StreamShape, TransformerConfig
from model.decoder import DrawingWeights
from model.transformer import Transformer
from train.bench import sample
from train.bench.harness import to_json
from train.machine.rates import Options

CFG = TransformerConfig(layers=3, width=32, heads=2, conv_kernel=3)
SHAPE = StreamShape(text_tokens=5, text_vocab=40, grid=4, image_vocab=24)


def test_bytes_and_operations_of_a_step_are_those_of_weights_text_and_masks() -> None:
    weights = DrawingWeights(Transformer(CFG, SHAPE), torch.float32)
    matrices = 3 * 12 * 32**2
    offsets = 5 + 4 + 6  # row: a row and itself; column: four rows; convolution 3 x 3 of the figure
    assert sample.step_bytes(weights, 1) == 4 * (matrices + 24 * 32) + 2 * 4 * 32 * (3 * 5 + 4 + 4 + 6)
    assert sample.step_bytes(weights, 9) - sample.step_bytes(weights, 8) == 2 * 4 * 32 * (4 + 4 + 6)
    assert sample.step_bytes(weights, 9, 9) - sample.step_bytes(weights, 9) == 8 * 2 * 4 * 32 * 3 * 5
    assert sample.step_flops(weights, 2) == 2 * 2 * (matrices + 24 * 32 + 2 * 32 * (3 * 5 + offsets))


def test_the_benchmark_gives_a_result_with_floors_and_ratios() -> None:
    result = sample.compare(CFG, SHAPE, (1, 4), Options("cpu", seconds=0.01, runs=1))
    assert json.loads(to_json(result))["name"] == "sample"
    assert result.ratios["batch 1, share of the floor"].goal == sample.GOAL_OF_FLOOR
    assert result.measured["batch 4"].value > 0 and result.floor["batch 4, floor"].value > result.floor["batch 1, floor"].value
