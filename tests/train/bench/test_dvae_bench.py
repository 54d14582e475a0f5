"""The dVAE's benchmark: its count of operations, its peers, and that both do the same work."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import DVAEConfig
from model.dvae import DVAE
from model.dvae_flops import decoder_flops, encoder_flops, train_flops
from model.relaxation import GumbelNoise
from train.bench import dvae
from train.bench.docs import check
from train.bench.harness import to_json
from train.machine.rates import Options

QUICK = Options(device="cpu", seconds=0.02, runs=2)
SMALL = DVAEConfig(image_size=16, downsample=8, groups=4, blocks_per_group=1, width=64, init_width=8, vocab=512)


def counted(work: Any) -> int:
    # torch does not count products that are added in place.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: lambda _, a, b, **rest: 2 * a[0] * a[1] * b[1]})
    with counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "cfg",
    [
        SMALL,
        DVAEConfig(image_size=16, downsample=2, groups=1, blocks_per_group=2, width=8, init_width=4, vocab=6),
        DVAEConfig(image_size=16, downsample=4, groups=2, blocks_per_group=2, width=8, init_width=16, vocab=12),
        DVAEConfig(image_size=32, downsample=4, groups=4, blocks_per_group=1, width=8, init_width=4, vocab=6),
    ],
)
def test_operations_are_those_that_torch_counts(cfg: DVAEConfig) -> None:
    model = DVAE(cfg)
    mapped, z = torch.rand(1, 3, cfg.image_size, cfg.image_size), torch.rand(1, cfg.vocab, cfg.grid, cfg.grid)
    with torch.no_grad():
        assert encoder_flops(cfg) == counted(lambda: model.encoder(mapped))
        assert decoder_flops(cfg) == counted(lambda: model.decoder(z))
    # So small a model keeps its relaxed codes, and computes nothing twice.
    assert train_flops(cfg) == counted(lambda: model(mapped, GumbelNoise([0]), 0.5).nll_B.sum().backward())


def test_the_released_sizes_take_these_operations() -> None:
    assert encoder_flops(DVAEConfig()) == pytest.approx(273e9, rel=0.01)
    assert decoder_flops(DVAEConfig()) == pytest.approx(309e9, rel=0.01)


def test_the_benchmark_compares_with_floor_and_package_of_its_own_run() -> None:
    pytest.importorskip("dall_e")
    found = dvae.compare(SMALL, 2, QUICK)
    check(json.loads(to_json(found)))
    for name in ("training", "encoding"):
        for dtype in ("fp32", "bf16"):
            ratio = found.ratios[f"{name} {dtype} over dall-e 0.1"]
            assert ratio.value == found.measured[f"{name} {dtype}"].value / found.peers[f"dall-e 0.1, {name}"].value
            assert 0 < found.ratios[f"{name}, share of the matrix rate, {dtype}"].value < 1.5


def test_without_the_package_the_benchmark_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dall_e", None)
    found = dvae.compare(SMALL, 1, QUICK)
    assert not found.peers and any("not installed" in note for note in found.notes)


def test_the_plain_step_trains_every_parameter_and_encodes_to_the_same_codes() -> None:
    dall_e = pytest.importorskip("dall_e")
    encoder, decoder = dvae._released(SMALL, "cpu")  # type: ignore[misc]
    assert isinstance(encoder, dall_e.Encoder)
    before = {name: p.detach().clone() for half in (encoder, decoder) for name, p in half.named_parameters(prefix=type(half).__name__)}
    dvae.plain_step(encoder, decoder, SMALL, 2, "cpu")()
    after = {name: p for half in (encoder, decoder) for name, p in half.named_parameters(prefix=type(half).__name__)}
    assert all(not torch.equal(before[name], parameter) for name, parameter in after.items())
    ours = DVAE(SMALL)
    ours.encoder.load_state_dict(encoder.state_dict())
    assert torch.equal(dvae.plain_encoding(encoder, SMALL, 2, "cpu")(), ours.encode(dvae._pixels(SMALL, 2, "cpu")))
