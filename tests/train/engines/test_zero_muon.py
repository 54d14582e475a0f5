"""Muon on ZeRO 1, 2 and 3: one, two and four ranks against a reference of whole matrices in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.ranks import run_in_ranks
from tests.train.engines.zero_cases import Case
from tests.train.engines.zero_muon_runs import COMPARED, HALVES, on_four, on_one, on_two


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("muon"))
    return {ranks: run_in_ranks(run, ranks, folder) for ranks, run in ((4, on_four), (2, on_two), (1, on_one))}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_updates_are_those_of_whole_matrices_in_one_process(found: Any, case: Case, ranks: int) -> None:
    for rank in found[ranks]:
        figures = rank["compared"][str(case)]
        assert figures["applied"] == [True, True, True, False] and figures["clipped"], figures
        assert figures["matrices"] < 1e-5 and figures["others"] < 1e-5, figures


def test_a_shard_ends_inside_a_matrix_and_the_state_is_by_kind_of_parameter(found: Any) -> None:
    for case in COMPARED:
        figures = [rank["compared"][str(case)] for rank in found[4]]
        assert any(each["cut"] for each in figures)
        assert set().union(*(each["state"] for each in figures)) == {("momentum", True), ("exp_avg", False), ("exp_avg_sq", False)}


@pytest.mark.parametrize("case", HALVES, ids=str)
def test_with_fp16_and_its_scales_losses_follow_those_of_fp32_on_any_number_of_ranks(found: Any, case: Case) -> None:
    plain = found[1][0]["halves"][str(Case(optimizer="muon"))]["losses"]
    for ranks in (1, 4):
        losses = found[ranks][0]["halves"][str(case)]["losses"]
        assert losses == pytest.approx(plain, rel=5e-3) and losses[-1] < losses[0], (losses, plain)


def test_replicas_on_other_machines_are_equal_bit_for_bit_with_exact_sums_and_with_factors(found: Any) -> None:
    for rank in found[4]:
        assert [each["compressed"] for each in rank["replicas"]] == [True, True, False, False]
        assert all(each["between"] == each["planned"] for each in rank["replicas"]), rank["replicas"]
        assert [each["between"] > 0 for each in rank["replicas"]] == [False, False, True, True]
        assert all(each["agree"] and each["losses"][-1] < each["losses"][0] + 0.1 for each in rank["replicas"])


def test_a_skipped_resblock_moves_nothing_of_its_own_and_the_others_move(found: Any) -> None:
    moved = {name for rank in found[4] for name in rank["skipped"]["changed"] if not name.startswith("average")}
    assert not [name for name in moved if "resblocks.1." in name]
    assert {"optimizer/momentum/resblocks.0.q.weight", "model/resblocks.3.mlp_2.weight"} <= moved
    for rank in found[4]:
        assert rank["skipped"]["applied"] and all(applied for *_, applied in rank["skipped"]["history"])


def test_bytes_counted_at_the_collective_are_those_of_plan_and_a_skipped_update_sends_none(found: Any) -> None:
    for rank in found[4]:
        assert len(rank["compared"]) + len(rank["halves"]) == len(COMPARED) + len(HALVES)
        for figures in (*rank["compared"].values(), *rank["halves"].values()):
            assert figures["sent"] == figures["planned"] and sum(figures["planned"]), figures
        assert not any(figures["idle"] for figures in rank["compared"].values())


def test_a_checkpoint_continues_bit_for_bit_and_loads_on_other_ranks_and_stages(found: Any) -> None:
    saved = found[4][0]["saved"]
    assert saved["again"] == saved["losses"]
    assert saved["whole"]["optimizer/momentum/resblocks.1.mlp_1.weight"].any()
    assert not saved["whole"]["optimizer/exp_avg/resblocks.1.mlp_1.weight"].any(), "matrices have no moments of AdamW"
    for ranks in (1, 2):
        loaded = found[ranks][0]["loaded"]
        assert loaded["whole"].keys() == saved["whole"].keys()
        assert [name for name, value in saved["whole"].items() if not torch.equal(loaded["whole"][name], value)] == []
        assert loaded["losses"] == pytest.approx(saved["losses"], rel=5e-3)
