"""What needs a GPU (``make gpu``): the networks give there what they give on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.config import DVAEConfig, StreamShape, TransformerConfig
from model.dvae import DVAE
from model.relaxation import GumbelNoise
from model.tokenizer_kinds import image_tokenizer
from model.transformer import Transformer
from tests.support.gpu import DEVICE, NEEDS_GPU

pytestmark = NEEDS_GPU


@pytest.mark.parametrize(("logits_dtype", "rtol", "atol"), [(torch.float32, 1e-3, 1e-4), (torch.bfloat16, 2e-2, 2e-2)])
def test_the_transformer_gives_the_same_losses_and_gradients(logits_dtype: torch.dtype, rtol: float, atol: float) -> None:
    shape = StreamShape(text_tokens=8, text_vocab=50, grid=4, image_vocab=30)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(layers=4, width=64, heads=4, conv_kernel=3), shape, logits_dtype=logits_dtype)
    inputs = torch.randint(50, (3, 8)), torch.tensor([0, 5, 8]), torch.randint(30, (3, 16))
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        model = model.to(device)
        model.zero_grad()
        text_nll_BT, image_nll_BI = model(*(tensor.to(device) for tensor in inputs))
        (text_nll_BT.sum() + image_nll_BI.sum()).backward()
        losses.append(torch.cat([text_nll_BT.flatten(), image_nll_BI.flatten()]).detach().cpu())
        gradients.append({name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=rtol, atol=atol)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=10 * rtol, atol=10 * atol)


def test_the_dvae_gives_the_same_terms() -> None:
    torch.manual_seed(0)
    model = DVAE(DVAEConfig(image_size=16, downsample=4, groups=2, blocks_per_group=1, width=16, init_width=8, vocab=32))
    pixels_B3YX = torch.rand(2, 3, 16, 16)
    noise = GumbelNoise([0, 1])  # drawn on the CPU and moved: a GPU's own generator gives other numbers
    ours = model(pixels_B3YX, noise, 0.5)
    moved = GumbelNoise([0, 1])
    moved.blocks = lambda *arguments: (block.to(DEVICE) for block in noise.blocks(*arguments))  # type: ignore[method-assign]
    theirs = model.to(DEVICE)(pixels_B3YX.to(DEVICE), moved, 0.5)
    torch.testing.assert_close(theirs.nll_B.cpu(), ours.nll_B, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(theirs.kl_B.cpu(), ours.kl_B, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("codebook", ["nearest", "cosine", "gumbel"])
def test_a_vqgan_gives_the_same_codes_and_pictures(codebook: Any) -> None:
    torch.manual_seed(0)
    cfg = DVAEConfig(
        kind="vqgan", image_size=32, downsample=8, groups=4, width=32, init_width=16, vocab=64, factors=(1, 1, 2, 4), attention=(3,), latent=16,
        codebook=codebook,
    )  # fmt: skip
    model, pixels_B3YX = image_tokenizer(cfg), torch.rand(4, 3, 32, 32)
    codes_BYX = model.encode(pixels_B3YX)
    drawn_B3YX = model.decode(codes_BYX)
    model = model.to(DEVICE)
    same = (model.encode(pixels_B3YX.to(DEVICE)).cpu() == codes_BYX).float().mean()
    assert same >= 0.9  # products in TF32 may turn a choice between vectors that are almost equally near
    torch.testing.assert_close(model.decode(codes_BYX.to(DEVICE)).cpu(), drawn_B3YX, rtol=1e-2, atol=1e-2)
