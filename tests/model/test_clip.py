"""The contrastive model embeds pictures and captions where they can be compared."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.clip import Clip
from model.config import ClipConfig
from tests.support.contrastive import contrastive_loss

CFG = ClipConfig(width=32, layers=2, heads=2, patch=4, embed=16)


def build() -> Clip:
    torch.manual_seed(0)
    return Clip(CFG, image_size=16, text_tokens=6, text_vocab=30)


def pictures() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_embeddings_are_unit_vectors_that_differ_between_inputs() -> None:
    model = build()
    text_BT = torch.arange(24).view(4, 6)
    for e_BE in (model.encode_image(pictures()), model.encode_text(text_BT, torch.tensor([6, 3, 0, 1]))):
        torch.testing.assert_close(e_BE.norm(dim=1), torch.ones(4))
        assert len(e_BE.detach().unique(dim=0)) == 4


def test_ids_beyond_a_captions_length_have_no_effect_and_those_within_do() -> None:
    model = build()
    a_BT = torch.arange(18).view(3, 6)
    lengths_B = torch.tensor([4, 0, 6])
    e_BE = model.encode_text(a_BT, lengths_B)
    b_BT = a_BT.clone()
    b_BT[0, 4:] = b_BT[1, :] = 29
    assert model.encode_text(b_BT, lengths_B).equal(e_BE)
    b_BT[0, 3] = 29
    assert not model.encode_text(b_BT, lengths_B)[0].equal(e_BE[0])


def test_the_text_tower_is_not_causal_and_knows_order() -> None:
    model = build()
    states: list[torch.Tensor] = []
    model.text_blocks[-1].register_forward_hook(lambda _m, _i, out: states.append(out))
    for text_BT in (torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[1, 2, 3, 4, 5, 7]])):
        model.encode_text(text_BT, torch.tensor([6]))
    assert not states[0][0, 0].equal(states[1][0, 0])
    swapped = model.encode_text(torch.tensor([[2, 1, 3, 4, 5, 6]]), torch.tensor([6]))
    assert not torch.allclose(swapped, model.encode_text(torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([6])), atol=1e-5)


def test_the_loss_is_symmetrical_and_lowest_for_matching_pairs() -> None:
    e_BE = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(2)), dim=1)
    other_BE = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    scale = torch.tensor(20.0)
    torch.testing.assert_close(contrastive_loss(e_BE, other_BE, scale), contrastive_loss(other_BE, e_BE, scale))
    assert contrastive_loss(e_BE, e_BE, scale) < 0.05
    assert contrastive_loss(e_BE, e_BE.roll(1, 0), scale) > 5
    assert float(contrastive_loss(e_BE, other_BE, torch.tensor(0.0))) == pytest.approx(math.log(5))


def test_the_scale_is_learned_and_never_above_100() -> None:
    model = build()
    text_BT = torch.arange(24).view(4, 6)
    contrastive_loss(model.encode_image(pictures()), model.encode_text(text_BT, torch.full((4,), 6)), model.scale).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    model.limit_scale()
    assert float(model.scale.detach()) == pytest.approx(100.0)
    model.log_scale.grad = None
    e_BE = F.normalize(torch.randn(4, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    contrastive_loss(e_BE, e_BE.roll(1, 0), model.scale).backward()
    assert model.log_scale.grad is not None and model.log_scale.grad > 0, "pairs that do not match pull it down from its limit"


def test_four_pairs_are_learned_by_heart() -> None:
    model = build()
    text_BT, lengths_B = torch.arange(24).view(4, 6), torch.full((4,), 6)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        loss = contrastive_loss(model.encode_image(pictures()), model.encode_text(text_BT, lengths_B), model.scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 0.1


def test_shapes_that_do_not_fit_are_refused_by_key() -> None:
    with pytest.raises(ValueError, match=r"clip.patch = 4 does not divide dvae.image_size = 18"):
        Clip(CFG, image_size=18, text_tokens=6, text_vocab=30)
    with pytest.raises(ValueError, match=r"pixels have shape \(1, 3, 8, 8\): expected \[B, 3, 16, 16\] \(dvae.image_size\)"):
        build().encode_image(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"text has shape \(1, 5\) with lengths \(1,\): expected \[B, 6\] \(tokenizer.max_tokens\)"):
        build().encode_text(torch.zeros(1, 5, dtype=torch.long), torch.tensor([5]))
