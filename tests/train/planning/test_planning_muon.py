"""What `plan` says of Muon: state, operations and bytes, of the 12B preset and of a single process."""

from __future__ import annotations

import pytest

from train.config import load_run
from train.config_compression import CompressionSection
from train.planning import estimate, states
from train.planning.estimate import Setting
from train.planning.flops import train_flops
from train.planning.hardware import GPUS
from train.planning.states import Cluster
from train.verbs import plan

MUON = ["dalle_fit.optimizer=muon"]


@pytest.mark.parametrize("words", [[], ["dalle_fit.precision=bf16", "dalle_fit.moments=fp32"]], ids=["16-bit", "fp32"])
def test_a_momentum_takes_half_of_what_two_moments_take(words: list[str]) -> None:
    plain, other = (estimate.memory(Setting.configured(load_run("12B", [*words, *more]), Cluster(1, 8))).states for more in ([], MUON))
    matrices, half = states.count(load_run("12B", []).dalle, load_run("12B", []).stream_shape()).matrices, 2 if not words else 4
    assert plain.moments - other.moments == half * matrices / 8 and other.gradients == plain.gradients


def test_an_update_is_widest_with_the_messages_where_they_take_more_than_gradients_laid_end_to_end() -> None:
    cfg = load_run("1.2B", MUON)
    setting = Setting.configured(cfg, Cluster(8, 8))  # of 64 shards each is smaller than a matrix in three copies
    found, held = estimate.memory(setting).states, max(load.held for load in estimate.orthogonalising(setting))
    assert found.update == found.gradients + held and held > 2 * 3 * 4 * cfg.dalle.width**2
    assert estimate.memory(Setting.configured(load_run("1.2B", []), Cluster(8, 8))).states.update < found.update


def test_operations_and_bytes_are_those_of_the_formulas() -> None:
    """300 d^3 for a layer, evenly dealt; each rank sends 4 (n - 1) / n bytes for each element of its shard."""
    cfg = load_run("12B", [*MUON, "zero.stage=3", "zero.sharding=node"])
    setting, d = Setting.configured(cfg, Cluster(2, 8)), cfg.dalle.width
    loads = estimate.orthogonalising(setting)
    assert len(loads) == 16 and sum(load.operations for load in loads) == cfg.dalle.layers * 300 * d**3
    assert max(load.operations for load in loads) < 1.02 * min(load.operations for load in loads)
    sent = estimate.exchanged(setting)
    shard = cfg.dalle.layers * 12 * d**2 / 8
    assert sent.outside == 2 * shard / 2 and sent.inside == pytest.approx(4 * 7 / 8 * shard / 2, rel=0.02)
    assert (
        estimate.traffic(setting).inside - sent.inside
        == estimate.traffic(Setting.configured(load_run("12B", ["zero.stage=3", "zero.sharding=node"]), Cluster(2, 8))).inside
    )
    low = Setting.configured(cfg.model_copy(update={"compression": CompressionSection(method="powersgd", rank=896)}), Cluster(2, 8))
    repeated = estimate.orthogonalising(low)
    assert len(repeated) == 8 and estimate.exchanged(low).outside == 0 and repeated[0].operations == 2 * loads[0].operations
    flat = Setting.configured(load_run("12B", [*MUON, "zero.stage=3", "zero.sharding=flat"]), Cluster(2, 8))
    of_flat = estimate.exchanged(flat)
    assert of_flat.outside > of_flat.inside > 0 and estimate.exchanged(flat, 0).inside <= of_flat.inside


def test_the_time_of_an_update_has_that_of_its_matrices() -> None:
    gpu = GPUS["H100-80GB"]
    plain, other = (estimate.times(Setting.configured(load_run("12B", more), Cluster(1, 8)), gpu) for more in ([], MUON))
    products = max(load.operations for load in estimate.orthogonalising(Setting.configured(load_run("12B", MUON), Cluster(1, 8))))
    assert other.optimizer - plain.optimizer > 0.9 * products / (gpu.tflops_16bit * 1e12 * estimate.EFFICIENCY)
    assert (other.compute, other.inside) == (plain.compute, plain.inside)


def test_plan_says_what_muon_takes_and_nothing_without_it() -> None:
    setting = Setting.configured(load_run("12B", MUON), Cluster(1, 8))
    (line,) = plan.orthogonalising(setting)
    share = 100 * 64 * 300 * 3968**3 / (train_flops(setting.cfg.dalle, setting.cfg.stream_shape()) * setting.cfg.dalle_fit.batch)
    assert line.startswith("muon ") and f" {share:.2f}% of those of all forward and backward passes" in line and "MB inside the machine" in line
    assert plan.orthogonalising(Setting.configured(load_run("12B", []), Cluster(1, 8))) == []
    (alone,) = plan.orthogonalising(Setting.configured(load_run("tiny", MUON), Cluster(1, 1)))
    assert "it sends 0.0 MB inside the machine and 0.0 MB outside" in alone
