"""What `plan` says of compression between machines: bytes over the real fragments, memory, checkpoints and times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from infra.errors import ConfigError
from train.config import load_run
from train.planning import estimate, network
from train.planning.estimate import Setting
from train.planning.hardware import GPUS
from train.planning.states import Cluster
from train.verbs import plan


@pytest.mark.parametrize(("width", "heads", "rank"), [(1920, 30, 512), (2688, 42, 640), (3968, 62, 896)])
def test_the_real_fragments_of_stage_3_send_the_papers_share_and_those_of_other_stages_more(width: int, heads: int, rank: int) -> None:
    cfg = load_run("12B", [f"dalle.width={width}", f"dalle.heads={heads}"])
    shares = {}
    for stage in (1, 2, 3):
        sent = estimate.compression(Setting(cfg, Cluster(128, 8), stage, "node", "half", 4, True, rank=rank))
        assert len(sent) == 8
        shares[stage] = {(one.short + one.basis) / one.compressed for one in sent}
    assert shares[3] == {rank * (8 + 2) / (2 * width * 8)}
    assert network.sent_share(width, rank, 8) == pytest.approx(rank * (8 + 2) / (2 * width * 8), rel=1e-12)
    assert min(shares[1]) > max(shares[3]) and shares[1] == shares[2]


def test_a_plan_says_what_compression_sends_keeps_and_stores(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["zero.stage=3", "zero.sharding=node", "compression.method=powersgd", "compression.rank=896"]
    plan.main("12B", words, nodes=128, gpus=8, memory=0, gpu="H200-141GB", tokens=0, rank=0)
    said = capsys.readouterr().out
    assert "rank 896, 112 a GPU; 846.6 MB of factors in 1-6-9, 199.1 MB exact: 16.9% of the bytes of exact sums" in said
    assert "14.11% of the elements that they stand for (even shards: 14.11%)" in said and "* ZeRO 3, node, 16-bit, rank 896" in said
    assert (
        "error buffers        6,728.7 MB a GPU with the projections, in fp32; 6,191,195.4 MB in a checkpoint (compression.error_buffers = 'own')"
        in said
    )
    assert "between machines after the backward pass" in said
    plan.main(
        "12B",
        [*words, "compression.refresh_every=100", "compression.error_buffers=sum"],
        nodes=128,
        gpus=8,
        memory=0,
        gpu="H200-141GB",
        tokens=0,
        rank=0,
    )
    said = capsys.readouterr().out
    assert "MB of new projections" in said and "48,368.7 MB in a checkpoint (compression.error_buffers = 'sum')" in said


def test_sums_over_machines_are_not_hidden_where_machines_are_replicas() -> None:
    cfg, gpu = load_run("12B", []), replace(GPUS["H200-141GB"], network_gb_s=1.0)
    exact, low = (estimate.times(Setting(cfg, Cluster(128, 8), 3, "node", "half", 4, True, rank=rank), gpu) for rank in (None, 896))
    assert exact.is_exposed and exact.expected == pytest.approx(max(exact.compute, exact.inside) + exact.outside + exact.optimizer)
    assert exact.compressing == 0 < low.compressing and low.expected < exact.expected and low.overlapped < low.expected
    flat = estimate.times(Setting(cfg, Cluster(128, 8), 3, "flat", "half", 4, True), gpu)
    assert not flat.is_exposed and flat.expected == max(flat.compute, flat.inside, flat.outside) + flat.optimizer


_NODE = ["zero.sharding=node", "compression.method=powersgd"]


def _said(capsys: pytest.CaptureFixture[str], words: list[str], nodes: int = 4) -> str:
    plan.main("1.2B", words, nodes=nodes, gpus=8, memory=0, gpu="H200-141GB", tokens=0, rank=0)
    return capsys.readouterr().out


def test_a_rank_that_does_not_divide_is_refused_by_the_plan_as_by_a_start() -> None:
    with pytest.raises(ConfigError, match=r"compression.rank = 100 does not divide over the 8 processes of a machine; use a multiple of 8\."):
        plan.main("1.2B", [*_NODE, "compression.rank=100"], nodes=4, gpus=8, memory=0, gpu="H200-141GB", tokens=0, rank=0)
    Setting.configured(load_run("1.2B", [*_NODE, "compression.rank=100"]), Cluster(1, 8))  # with one machine nothing is divided


def test_a_plan_says_what_would_compress_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert "with zero.stage=3, which cuts every parameter evenly, it would send 147.6 instead of 684.9 MB" in _said(
        capsys, [*_NODE, "compression.rank=512"]
    )
    assert "little compressed" not in _said(capsys, [*_NODE, "compression.rank=512", "zero.stage=3"])
    assert "a lower compression.rank compresses" in _said(capsys, [*_NODE, "compression.rank=80000", "zero.stage=3"])


def test_a_plan_says_why_nothing_is_compressed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "compression.rank = 512 has no effect; set the method to 'powersgd'" in _said(capsys, ["zero.sharding=node", "compression.rank=512"])
    assert "compression          none: there is one machine" in _said(capsys, [*_NODE, "compression.rank=512"], nodes=1)
    assert "compression  " not in _said(capsys, [])
