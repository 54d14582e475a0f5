"""Views of a rank's states for checkpoints: made once, and again where a state has moved."""

from __future__ import annotations

import torch

from train.engines.zero.shards import Piece, StateViews


def test_views_are_the_same_until_a_state_moves_and_follow_it() -> None:
    pieces = [Piece("a", 0, 0, 0, 3, 6), Piece("b", 0, 3, 2, 2, 9)]
    views = StateViews(pieces)
    master, moment = torch.arange(5.0), torch.zeros(5)

    def found(moment: torch.Tensor) -> dict[str, list[float]]:
        return {name: fragment.tensor.tolist() for name, fragment in views.of({0: {"model": master.detach(), "moment": moment.detach()}}).items()}

    assert found(moment) == {"model/a": [0, 1, 2], "moment/a": [0, 0, 0], "model/b": [3, 4], "moment/b": [0, 0]}
    before = views.of({0: {"model": master, "moment": moment}})
    master += 1
    assert found(moment)["model/b"] == [4, 5]
    after = views.of({0: {"model": master, "moment": moment}})
    assert all(after[name] is before[name] for name in before) and (after["model/b"].offset, after["model/b"].total) == (2, 9)
    assert found(torch.ones(5))["moment/a"] == [1, 1, 1], "another tensor, as after the first update"
