"""PowerSGD between machines on ZeRO 1, 2 and 3: two machines of two processes, then three of one, then one."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

import pytest
import torch

from tests.support.ranks import run_in_ranks
from tests.train.engines.zero_compression_runs import CASES, KEPT, SKIPS, on_four, on_one, on_three

SMALL = {"fp32": 1e-5, "fp16": 2e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("compressed"))


@pytest.fixture(scope="module")
def four(folder: str) -> list[dict[str, Any]]:
    return run_in_ranks(on_four, 4, folder)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_full_rank_trains_as_exact_sums_do(four: Any, case: Any) -> None:
    found = four[0]["full"][str(case)]
    assert max(found.values()) < 4 * SMALL[case.precision], found


def test_replicas_are_bit_equal_after_every_update_and_nothing_of_the_gradients_is_lost(four: Any) -> None:
    for found in (run for rank in four for run in rank["low"]):
        assert all(found["agree"]) and len(found["agree"]) == 6
        assert found["balance"] < 5e-3 and found["norm"] < 2e-2 and found["owed"] > 0, found


def test_bytes_counted_at_the_collectives_are_those_of_the_fragments_and_those_of_plan(four: Any) -> None:
    for run in (run for rank in four for run in rank["low"]):
        assert run["counted"] and run["compressed"] > 0 and run["plan"] and run["plan's fragments"]


def test_metrics_say_what_compression_owes_beside_a_gradient_what_was_sent_and_how_long_it_took(four: Any) -> None:
    ratios = []
    for run in four[0]["low"]:
        for step, (found, expected) in enumerate(run["watched"]):
            if step % 2 == 0:  # numerics_every = 2
                assert not found
                continue
            assert found["between_machines_bytes"] == run["sent"][step] and 0 < found["between_machines_s"] < 60
            for name, value in expected.items():
                ratios.append(math.log(found["owed" if name == "in all" else f"owed/{name}"] / value))
    # The gradients of so small a model have few directions, so that a single estimate may be wrong by a third; many are not.
    assert len(ratios) == 90 and max(map(abs, ratios)) < 0.5 and abs(mean(ratios)) < 0.06, ratios


@pytest.mark.parametrize("case", SKIPS, ids=str)
def test_an_infinity_on_one_rank_of_one_machine_skips_on_all_and_the_errors_keep_what_was_finite(four: Any, case: Any) -> None:
    for rank, result in enumerate(four):
        found = result["infinite"][str(case)]
        assert found["applied"] == (case.skip == "resblock") and found["finite"] and found["agree"]
        assert all(applied for *_, applied in found["history"]) and found["history"][-1][0] < found["history"][0][0] + 0.5
        if case.skip == "all":
            assert found["moved"] == []
        else:
            assert not [name for name in found["moved"] if ".1." in name and "average" not in name] and found["moved"]
        poisoned = {"resblocks.1.mlp_1.weight"} if rank in (2, 3) and case.stage == 3 else set()  # one rank's Inf reaches the shards of its machine
        if case.stage == 3:
            assert set(found["held"]) - set(found["taken in"]) == poisoned, (rank, found["taken in"])


def test_an_error_that_is_not_finite_becomes_zero_and_no_other(four: Any) -> None:
    for rank, result in enumerate(four):
        found = result["contaminated"]
        assert not found["applied"] and found["zero"] == (["resblocks.1.mlp_1.weight"] if rank == 3 else [])
        assert all(applied for *_, applied in found["later"])


def test_as_many_machines_go_on_with_their_own_buffers_bit_for_bit_and_from_a_sum_to_rounding(four: Any) -> None:
    for index, section in enumerate(KEPT):
        for rank in four:
            found = rank["resumed"][index]
            for name, value in found["owed"].items():
                assert (found["owed again"][name] - value).norm() <= 1e-6 * value.norm() + 1e-12, name
            if section.error_buffers == "own":
                assert found["same"] and found["again"] == found["on"]
            else:
                assert not found["same"] and [one[0] for one in found["again"]] == pytest.approx([one[0] for one in found["on"]], rel=2e-3)


def paid(found: dict[str, Any]) -> None:
    """After an update, what is applied and still owed is what was owed and given."""
    assert found["was applied"]
    for name, value in found["given"].items():
        before, after = found["owed"].get(name, torch.zeros_like(value)), found["after"].get(name, torch.zeros_like(value))
        scale = float((before + value).norm())
        assert (before + value - found["applied"][name] - after).norm() < 5e-3 * scale + 1e-9, name


def equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["owed"].keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found["owed"][name] - value).norm() <= 1e-6 * value.norm(), name


def test_errors_survive_from_two_machines_to_three_and_to_one(four: Any, folder: str) -> None:
    three, *others = run_in_ranks(on_three, 3, folder)
    one = run_in_ranks(on_one, 1, folder)[0]
    equal(three["three"], four[0]["resumed"][0]["owed"])
    equal(three["three of a sum"], four[0]["resumed"][2]["owed"])
    for found in (three["three"], three["three of a sum"]):
        paid(found)
        assert found["active"] and found["kept on"]
        assert any("the sum of the error buffers of 2 machines is divided over 3" in line for line in found["said"]), found["said"]
    assert [found["said"] for other in others for found in other.values()] == [[]] * 4, "one rank says what holds for all"
    for found in (one["one"], one["flat"]):
        equal(found, four[0]["resumed"][0]["owed"])
        paid(found)
        assert not found["active"] and not found["kept on"] and not any(value.any() for value in found["after"].values())
        assert found["said"][-1] == "compression is off: the error buffers of 3 machines are added to the next update, once"
    assert one["one"]["said"][:-1] == ["compression is off: there is one machine, so nothing is sent between machines"], (
        "once, and not with the restore"
    )
    assert one["flat"]["said"][:-1] == [], "where no compression is configured, nothing is said of it"


def test_a_run_that_is_switched_off_or_cut_otherwise_pays_its_errors_once(four: Any) -> None:
    off, other = four[0]["switched off"], four[0]["other stage"]
    equal(off, four[0]["resumed"][1]["owed"])
    equal(other, four[0]["resumed"][0]["owed"])
    paid(off)
    paid(other)
    assert not off["kept on"] and any("compression is off" in line for line in off["said"])
    assert other["kept on"] and any("other parts of the matrices are compressed than before" in line for line in other["said"])


def test_deepspeed_shows_no_reduced_gradient_before_a_backward_pass_has_ended(four: Any) -> None:
    """So that nothing between machines can begin before (docs/compression.md, "Overlap"). Should this fail, it can."""
    for found in four[0]["early"]:
        assert found["hooks"] > 5 and found["early"] == 0 < found["after"], found


def test_a_rank_that_does_not_divide_is_refused(four: Any) -> None:
    assert "compression.rank = 3 does not divide over the 2 processes of a machine; use a multiple of 2" in four[0]["refused"]
