"""The discrete VAE: sizes of the release, likelihood, objective, precisions, and codes there and back."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model.config import DVAEConfig
from model.dvae import DVAE, Conv2d, DVAETerms, logit_laplace_nll, loss, map_pixels, pictures, unmap_pixels
from model.relaxation import GumbelNoise

SMALL = DVAEConfig(image_size=16, downsample=4, groups=3, blocks_per_group=1, width=8, init_width=8, vocab=12)


def net(cfg: DVAEConfig = SMALL, dtype: torch.dtype = torch.float32, seed: int = 0) -> DVAE:
    torch.manual_seed(seed)
    return DVAE(cfg, dtype)


def some_pictures(count: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def noise(count: int = 3) -> GumbelNoise:
    return GumbelNoise(range(count))


class Quiet(GumbelNoise):
    """Noise so small that it rarely changes the largest logit."""

    def blocks(self, *arguments: Any) -> Iterator[Tensor]:
        return (1e-3 * block for block in super().blocks(*arguments))


def test_default_sizes_are_those_of_the_release_to_the_parameter() -> None:
    with torch.device("meta"):
        model = DVAE(DVAEConfig())
        logits_BNYX = model.encoder(torch.empty(1, 3, 256, 256))
        stats_B6YX = model.decoder(torch.empty(1, 8192, 32, 32))
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert (logits_BNYX.shape, stats_B6YX.shape) == ((1, 8192, 32, 32), (1, 6, 256, 256))


def test_parameters_carry_the_names_of_the_release() -> None:
    with torch.device("meta"):
        names = set(DVAE(DVAEConfig()).state_dict())
    expected = {f"{half}.blocks.{place}.{letter}" for half in ("encoder", "decoder") for place in ("input", "output.conv") for letter in "wb"}
    for half, changes in (("encoder", ("group_2", "group_3", "group_4")), ("decoder", ("group_1", "group_2", "group_3", "group_4"))):
        blocks = [f"{half}.blocks.group_{g}.block_{b}" for g in range(1, 5) for b in (1, 2)]
        expected |= {f"{block}.res_path.conv_{i}.{letter}" for block in blocks for i in range(1, 5) for letter in "wb"}
        expected |= {f"{half}.blocks.{group}.block_1.id_path.{letter}" for group in changes for letter in "wb"}
    assert names == expected


@pytest.mark.parametrize(("groups", "downsample"), [(1, 2), (2, 4), (3, 4), (4, 4), (2, 2), (3, 8)])
def test_any_groups_and_downsampling_give_the_configured_grid_and_size_back(groups: int, downsample: int) -> None:
    cfg = DVAEConfig(image_size=16, downsample=downsample, groups=groups, blocks_per_group=1, width=4, init_width=4, vocab=5)
    model = net(cfg)
    codes_BYX = model.encode(some_pictures(2))
    assert codes_BYX.shape == (2, cfg.grid, cfg.grid) and codes_BYX.dtype == torch.int64
    assert model.decode(codes_BYX).shape == (2, 3, 16, 16)


def test_a_fresh_convolution_keeps_the_scale_of_its_input_and_has_no_bias() -> None:
    torch.manual_seed(0)
    conv = Conv2d(64, 256, 3)
    assert conv.w.std().item() == pytest.approx(1 / math.sqrt(64 * 9), rel=0.02)
    assert conv.b.abs().max() == 0


def test_residual_branches_start_small() -> None:
    model = net()
    block = model.encoder.blocks.get_submodule("group_1.block_1")
    x_BCYX = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    branch_BCYX = block(x_BCYX) - x_BCYX
    layers = SMALL.groups * SMALL.blocks_per_group
    torch.testing.assert_close(branch_BCYX * layers**2, block.get_submodule("res_path")(x_BCYX), rtol=1e-4, atol=1e-5)


def test_pixel_mapping_has_the_papers_ends_and_an_inverse() -> None:
    assert map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])
    x = torch.linspace(0, 1, 11)
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)
    assert unmap_pixels(torch.tensor([0.01, 0.99])).tolist() == [0, 1]


@pytest.mark.parametrize(("mu", "ln_b"), [(0.0, 0.0), (1.5, -1.0), (-2.0, 0.3)])
def test_logit_laplace_density_integrates_to_one(mu: float, ln_b: float) -> None:
    # Substituting the logit spreads the mass evenly: dx = x (1 - x) dt.
    t = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    x = torch.sigmoid(t).clamp(1e-17, 1 - 1e-16)
    density = torch.exp(-logit_laplace_nll(x, torch.full_like(x, mu), torch.full_like(x, ln_b)))
    assert torch.trapezoid(density * x * (1 - x), t).item() == pytest.approx(1, abs=2e-3)


def test_likelihood_under_relaxed_codes_approaches_that_of_true_codes() -> None:
    model = net()
    with torch.no_grad():
        model.encoder.blocks.get_submodule("output.conv").w.mul_(40)  # confident, so that noise rarely changes the winner
        model.decoder.blocks.get_submodule("input").w.mul_(10)  # and codes that matter
        true = model(some_pictures(), None)
        gaps = [(model(some_pictures(), Quiet(range(3)), tau).nll_B - true.nll_B).abs().mean().item() for tau in (8.0, 1.0, 1 / 16)]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.1 * gaps[0]


def test_objective_is_the_negative_elb_over_the_number_of_pixel_values() -> None:
    beta, values, positions = 6.6, 3 * 16 * 16, SMALL.grid**2
    terms: DVAETerms = net()(some_pictures(), noise(), 0.7)
    elb_B = -terms.nll_B * values - beta * terms.kl_B * positions
    torch.testing.assert_close(loss(terms.nll_B, terms.kl_B, beta, SMALL.downsample), -elb_B.mean() / values)


def test_floor_of_ln_b_bounds_the_likelihood_of_flat_pictures_and_touches_nothing_above_it() -> None:
    torch.manual_seed(0)
    free, floored = DVAE(SMALL), DVAE(SMALL, min_ln_b=-1.0)
    floored.load_state_dict(free.state_dict())
    assert torch.equal(free(some_pictures(), noise(), 0.5).nll_B, floored(some_pictures(), noise(), 0.5).nll_B)  # a fresh ln b is near 0
    for model in (free, floored):
        with torch.no_grad():
            model.decoder.blocks.get_submodule("output.conv").b[3:] = -20.0
            model.decoder.blocks.get_submodule("output.conv").w.zero_()
    grey = torch.full((1, 3, 16, 16), 0.5)  # mu = 0 is exactly right for it
    at_the_peak = math.log(2) + 2 * math.log(0.5)
    assert free(grey, None).nll_B.item() == pytest.approx(at_the_peak - 20, abs=1e-3)
    assert floored(grey, None).nll_B.item() == pytest.approx(at_the_peak - 1, abs=1e-3)


def test_kl_at_initialisation_is_far_below_ln_n() -> None:
    terms: DVAETerms = net()(some_pictures(), noise(), 1.0)
    assert 0 < terms.kl_B.max() < 0.5 * math.log(SMALL.vocab)


def test_both_terms_train_the_encoder_through_the_relaxation() -> None:
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        model = net()
        terms = model(some_pictures(), noise(), 0.5)
        (weights[0] * terms.nll_B.sum() + weights[1] * terms.kl_B.sum()).backward()
        grad = model.encoder.blocks.get_submodule("input").w.grad
        assert grad is not None and grad.abs().max() > 0


def test_terms_of_a_picture_do_not_depend_on_its_batch() -> None:
    model, pictures_B3YX = net(), some_pictures()
    together, alone = model(pictures_B3YX, noise(), 0.5), model(pictures_B3YX[1:2], GumbelNoise([1]), 0.5)
    torch.testing.assert_close(together.nll_B[1:2], alone.nll_B)
    torch.testing.assert_close(together.kl_B[1:2], alone.kl_B)


def test_looking_codes_up_equals_the_one_hot_decoder_bit_for_bit() -> None:
    model = net()
    with torch.no_grad():
        model.decoder.blocks.get_submodule("input").b.normal_()  # a fresh bias is zero and would hide its own absence
    codes_BYX = torch.randint(0, 12, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    one_hot_BNYX = torch.nn.functional.one_hot(codes_BYX, 12).permute(0, 3, 1, 2).float()
    assert torch.equal(model.decoder.from_codes(codes_BYX), model.decoder(one_hot_BNYX))
    assert torch.equal(model.decode(codes_BYX), pictures(model.decoder(one_hot_BNYX)))


def test_without_noise_the_forward_pass_decodes_the_codes_of_encode() -> None:
    model, pictures_B3YX = net(), some_pictures()
    terms = model(pictures_B3YX, None)
    assert torch.equal(model.encode(pictures_B3YX), terms.codes_BYX)
    assert torch.equal(model.encode(pictures_B3YX), model.encoder(map_pixels(pictures_B3YX)).argmax(1))
    assert torch.equal(model.decode(model.encode(pictures_B3YX)), pictures(terms.stats_B6YX))


def test_a_few_updates_lower_the_objective() -> None:
    model = net()
    pictures_B3YX = some_pictures()[:, :, :1, :1].expand(-1, -1, 16, 16)  # flat colours: something to learn
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        terms = model(pictures_B3YX, noise(), 0.5)
        total = loss(terms.nll_B, terms.kl_B, 1.0, SMALL.downsample)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] - 0.3


def test_bf16_products_stay_near_fp32_ones_and_terms_stay_fp32() -> None:
    exact, rounded = net(), net(dtype=torch.bfloat16)
    a, b = exact(some_pictures(), noise(), 0.5), rounded(some_pictures(), noise(), 0.5)
    assert {b.nll_B.dtype, b.kl_B.dtype, b.stats_B6YX.dtype} == {torch.float32}
    assert not torch.equal(a.stats_B6YX, b.stats_B6YX)
    torch.testing.assert_close(a.kl_B, b.kl_B, rtol=0, atol=0.01)
    torch.testing.assert_close(a.nll_B, b.nll_B, rtol=0.01, atol=0.01)
    b.nll_B.sum().backward()
    assert {p.grad.dtype for p in rounded.parameters() if p.grad is not None} == {torch.float32}


def test_only_the_convolutions_around_the_relaxation_and_the_last_one_are_fp32() -> None:
    exact = {name for name, part in net(dtype=torch.bfloat16).named_modules() if isinstance(part, Conv2d) and part.compute_dtype == torch.float32}
    assert exact == {"encoder.blocks.output.conv", "decoder.blocks.input", "decoder.blocks.output.conv"}


def test_channels_last_pictures_give_the_same_terms() -> None:
    model, pictures_B3YX = net(), some_pictures()
    a, b = model(pictures_B3YX, noise(), 0.5), model(pictures_B3YX.contiguous(memory_format=torch.channels_last), noise(), 0.5)
    torch.testing.assert_close(a.nll_B, b.nll_B)
    torch.testing.assert_close(a.kl_B, b.kl_B)
    assert torch.equal(a.codes_BYX, b.codes_BYX)


@pytest.mark.parametrize("shape", [(2, 3, 16, 20), (2, 1, 16, 16), (3, 16, 16)])
def test_pictures_of_another_size_are_refused_with_the_key_to_change(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[batch, 3, 16, 16\]; crop them or change dvae.image_size"):
        net().encode(torch.rand(shape))


@pytest.mark.parametrize("codes", [torch.zeros(2, 16, dtype=torch.int64), torch.zeros(1, 4, 5, dtype=torch.int64), torch.zeros(1, 4, 4)])
def test_codes_of_another_grid_are_refused(codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected integers \[batch, 4, 4\], the grid of dvae.image_size / dvae.downsample"):
        net().decode(codes)


@pytest.mark.parametrize("code", [-1, 12])
def test_codes_out_of_range_are_refused_with_the_range(code: int) -> None:
    codes_BYX = torch.zeros(1, 4, 4, dtype=torch.int64)
    codes_BYX[0, 1, 2] = code
    with pytest.raises(
        ValueError, match=rf"codes from {min(0, code)} to {max(0, code)}: dvae\.vocab = 12 accepts 0 to 11; are they of another dVAE\?"
    ):
        net().decode(codes_BYX)


def test_average_pooling_differs_from_max_pooling_and_keeps_the_shapes() -> None:
    maximum, average = net(), net(dataclasses.replace(SMALL, pool="average"))
    average.load_state_dict(maximum.state_dict())
    a, b = (model.encoder(map_pixels(some_pictures())) for model in (maximum, average))
    assert a.shape == b.shape and not torch.allclose(a, b)


def gradients(model: DVAE, scale: float = 1.0) -> dict[str, Tensor]:
    terms: DVAETerms = model(some_pictures(), noise(), 0.5)
    model.zero_grad()
    (scale * (terms.nll_B.sum() + terms.kl_B.sum())).backward()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def test_recomputing_blocks_changes_no_gradient_and_saves_their_insides() -> None:
    kept, recomputed = net(), net()
    recomputed.recompute_blocks()
    ours, theirs = (gradients(model) for model in (recomputed, kept))
    assert ours.keys() == theirs.keys() == {name for name, _ in kept.named_parameters()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert saved_bytes(recomputed) < 0.7 * saved_bytes(kept)


def saved_bytes(model: DVAE) -> int:
    """Bytes that autograd keeps for the backward pass, parameters aside; each storage counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms = model(some_pictures(), noise(), 0.5)
    assert terms.nll_B.requires_grad
    return sum(found.values())


def test_compiled_groups_give_the_same_gradients_under_the_same_names() -> None:
    plain, compiled = net(), net()
    compiled.compile_groups(backend="aot_eager")
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in compiled.named_parameters()]
    ours, theirs = gradients(compiled), gradients(plain)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def test_fp16_products_stay_near_fp32_ones_and_a_loss_scale_keeps_small_gradients() -> None:
    exact, rounded = net(), net(dtype=torch.float16)
    a, b = exact(some_pictures(), noise(), 0.5), rounded(some_pictures(), noise(), 0.5)
    assert not torch.equal(a.stats_B6YX, b.stats_B6YX)
    torch.testing.assert_close(a.nll_B, b.nll_B, rtol=2e-3, atol=2e-3)
    theirs = gradients(exact)

    def error(scale: float) -> float:
        ours = gradients(rounded, scale)
        assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
        return max(float((ours[name] - gradient).norm() / gradient.norm()) for name, gradient in theirs.items())

    small = 2.0**-14  # a loss of this size is what a large batch leaves of one picture
    assert error(small * 2.0**14) < 0.1 < error(small)
