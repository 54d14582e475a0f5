"""Options of the transformer for learning from few pictures: inputs that differ from targets, matrices that begin as zeros, the z-loss."""

from __future__ import annotations

import pytest
import torch

from model.config import TransformerConfig
from tests.model.test_transformer import SHAPE, batch, build, gradients


def test_what_is_read_and_what_is_predicted_may_differ() -> None:
    """Targets stay: only inputs after the changed one see it, and each head's targets are those given."""
    model, (text_BT, lengths_B, codes_BI) = build(), batch()
    other_BT, other_BI = text_BT.clone(), codes_BI.clone()
    other_BT[:, 1] = (other_BT[:, 1] + 1) % SHAPE.text_vocab
    other_BI[:, 3] = (other_BI[:, 3] + 1) % SHAPE.image_vocab
    plain, same = model(text_BT, lengths_B, codes_BI), model(text_BT, lengths_B, codes_BI, text_BT, codes_BI)
    assert all(map(torch.equal, plain, same))
    text_nll_BT, image_nll_BI = model(text_BT, lengths_B, codes_BI, None, other_BI)
    assert torch.equal(text_nll_BT, plain[0]) and torch.equal(image_nll_BI[:, :4], plain[1][:, :4])
    assert (image_nll_BI[:, 4] != plain[1][:, 4]).all(), "the next code is predicted from the other one"
    text_BTD, image_BID = model.predicting_states(other_BT, lengths_B, other_BI)
    by_hand = model.image_unembedding(image_BID).log_softmax(2).gather(2, codes_BI[..., None])[..., 0]
    torch.testing.assert_close(model(text_BT, lengths_B, codes_BI, other_BT, other_BI)[1], -by_hand)
    text_by_hand = model.text_unembedding(text_BTD).log_softmax(2).gather(2, text_BT[..., None])[..., 0]
    torch.testing.assert_close(model(text_BT, lengths_B, codes_BI, other_BT, other_BI)[0][2], -text_by_hand[2])
    with pytest.raises(ValueError, match="image codes run from 0 to 24"):
        model(text_BT, lengths_B, codes_BI.index_fill(1, torch.tensor([0]), 24), text_BT, codes_BI.zero_())


def test_zero_projections_leave_the_stream_alone_and_every_other_weight_as_it_was() -> None:
    plain, zero = build(), build(TransformerConfig(layers=4, width=32, heads=2, conv_kernel=3, zero_projections=True))
    last = {name for name, p in plain.named_parameters() if not torch.equal(p, zero.get_parameter(name))}
    assert last == {f"resblocks.{i}.{'mlp_2' if i % 2 else 'post'}.weight" for i in range(8)}
    assert not any(zero.get_parameter(name).any() for name in last)
    text_BT, lengths_B, codes_BI = batch()
    embedded_BSD = torch.cat([zero.embed_text(text_BT, lengths_B), zero.embed_image(codes_BI[:, :-1])], 1)
    assert torch.equal(zero.states(text_BT, lengths_B, codes_BI), embedded_BSD)
    assert all(zero_grad.any() for name, zero_grad in gradients(zero, batch()).items() if name in last), "and they learn"


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_z_loss_reaches_both_heads_and_no_figure(z_loss: float) -> None:
    plain, model = build(), build(z_loss=z_loss)
    assert all(map(torch.equal, plain(*batch()), model(*batch())))
    changed = {name for name, grad in gradients(model, batch()).items() if not torch.equal(grad, gradients(plain, batch())[name])}
    assert bool(changed) == bool(z_loss) and (not z_loss or {"text_unembedding.weight", "image_unembedding.weight"} <= changed)
