"""The transformer is the paper's: leak-free, with its embeddings, losses, gradient points and parameter layout."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_engines import EngineName, make_engine
from model.config import StreamShape, TransformerConfig
from model.masks import KINDS, Kind, dense_mask, layer_kinds
from model.transformer import Transformer, parameter_tags, quick_gelu
from tests.support.logits import logits

Inputs = tuple[Tensor, Tensor, Tensor]
Change = Callable[[Tensor, Tensor, Tensor], Inputs]
SHAPE = StreamShape(text_tokens=5, text_vocab=40, grid=4, image_vocab=24)
CFG = TransformerConfig(layers=4, width=32, heads=2, conv_kernel=3)
LENGTHS = torch.tensor([3, 0, 5])


def build(cfg: TransformerConfig = CFG, shape: StreamShape = SHAPE, **options: Any) -> Transformer:
    torch.manual_seed(0)
    return Transformer(cfg, shape, **options)


def batch(shape: StreamShape = SHAPE, count: int = 3) -> Inputs:
    g = torch.Generator().manual_seed(7)
    text_BT = torch.randint(0, shape.text_vocab, (count, shape.text_tokens), generator=g)
    return text_BT, LENGTHS[:count], torch.randint(0, shape.image_vocab, (count, shape.image_tokens), generator=g)


def gradients(model: Transformer, inputs: Inputs) -> dict[str, Tensor]:
    model.zero_grad()
    text_nll_BT, image_nll_BI = model(*inputs)
    (text_nll_BT.sum() / model.text_counts(inputs[1]).sum() / 8 + 7 / 8 * image_nll_BI.mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def jacobian_support(function: Callable[[Tensor], Tensor], x_SD: Tensor) -> Tensor:
    """Which output state depends on which input state, by gradients: bool [S, S]."""
    jacobian_SDSD = torch.autograd.functional.jacobian(lambda x: function(x[None])[0], x_SD)
    return jacobian_SDSD.abs().sum((1, 3)) > 0


@pytest.mark.parametrize("engine", ["dense", "structured"])
def test_the_whole_model_leaks_nothing_from_later_states_and_reads_all_text(engine: EngineName) -> None:
    model = build(attend=make_engine(engine, CFG, SHAPE, torch.device("cpu")))

    def run(x_BSD: Tensor) -> Tensor:
        for block in model.resblocks:
            x_BSD = block(x_BSD, model.attend)
        return x_BSD

    support_SS = jacobian_support(run, torch.randn(SHAPE.states, 32) * 0.1)
    assert not support_SS.triu(1).any()
    assert support_SS[5:, :5].all()
    assert support_SS.diagonal().all()


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_logit_depends_on_exactly_the_inputs_that_its_layers_mask_allows(engine: EngineName, kind: Kind) -> None:
    """By gradients through one layer, the last norm and the unembeddings: exactly zero outside the mask, and not zero inside."""
    model = build(attend=make_engine(engine, CFG, SHAPE, torch.device("cpu")))
    first = 2 * layer_kinds(CFG.layers).index(kind)

    def run(x_SD: Tensor) -> Tensor:
        x_BSD = x_SD[None]
        for block in list(model.resblocks)[first : first + 2]:
            x_BSD = block(x_BSD, model.attend)
        text_BTD, image_BID = model.final_norm(x_BSD).split([SHAPE.text_tokens, SHAPE.image_tokens], dim=1)
        # Every logit of a state, weighted at random, so that none hides another.
        return torch.cat(
            [(head(x) * torch.linspace(1, 2, len(head.weight)).cos()).sum(2) for head, x in zip(heads, (text_BTD, image_BID), strict=True)], 1
        )[0]

    heads = (model.text_unembedding, model.image_unembedding)
    jacobian_SSD = torch.autograd.functional.jacobian(run, torch.randn(SHAPE.states, 32))
    assert (jacobian_SSD.abs().sum(2) > 0).equal(dense_mask(kind, SHAPE, CFG))


def test_a_changed_code_changes_the_logits_of_later_codes_only() -> None:
    model, (text_BT, lengths_B, codes_BI) = build(), batch()
    other_BI = codes_BI.clone()
    other_BI[:, 6] = (other_BI[:, 6] + 1) % SHAPE.image_vocab
    text_a, image_a = logits(model, text_BT, lengths_B, codes_BI)
    text_b, image_b = logits(model, text_BT, lengths_B, other_BI)
    assert text_a.equal(text_b)
    assert image_a[:, :7].equal(image_b[:, :7])
    assert not image_a[:, 7].equal(image_b[:, 7])


def test_a_changed_text_token_reaches_later_text_and_every_code() -> None:
    model, (text_BT, lengths_B, codes_BI) = build(), batch()
    other_BT = text_BT.clone()
    other_BT[2, 1] = (other_BT[2, 1] + 1) % SHAPE.text_vocab
    text_a, image_a = logits(model, text_BT, lengths_B, codes_BI)
    text_b, image_b = logits(model, other_BT, lengths_B, codes_BI)
    assert text_a[2, :2].equal(text_b[2, :2])
    assert (text_a[2, 2:] != text_b[2, 2:]).any(1).all()
    assert (image_a[2] != image_b[2]).any(1).all()
    assert image_a[:2].equal(image_b[:2])


def test_ids_beyond_a_captions_length_have_no_effect() -> None:
    model, (text_BT, lengths_B, codes_BI) = build(), batch()
    is_padding_BT = torch.arange(5) >= lengths_B[:, None]
    for a, b in zip(model(text_BT, lengths_B, codes_BI), model(text_BT.masked_fill(is_padding_BT, 11), lengths_B, codes_BI), strict=True):
        assert a.equal(b)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_a_captions_last_token_is_seen_by_every_code_and_what_follows_it_is_padding(length: int) -> None:
    model, (text_BT, _, codes_BI) = build(), batch()
    lengths_B = torch.full((3,), length)
    other_BT = text_BT.clone()
    other_BT[:, length - 1] = (other_BT[:, length - 1] + 1) % SHAPE.text_vocab
    assert (logits(model, text_BT, lengths_B, codes_BI)[1] != logits(model, other_BT, lengths_B, codes_BI)[1]).any(2).all()
    padding_BTD = model.text_padding().expand(3, -1, -1)
    states_BTD = model.embed_text(text_BT, lengths_B)
    assert states_BTD[:, length + 1 :].equal(padding_BTD[:, length + 1 :]) and (states_BTD != padding_BTD).any(2)[:, : length + 1].all()


def test_padding_vectors_matter_only_where_there_is_padding() -> None:
    model, inputs = build(), batch()
    before = model(*inputs)[1]
    with torch.no_grad():
        model.text_padding.weight[4] += 1.0
    after = model(*inputs)[1]
    assert after[2].equal(before[2])
    assert (after[:2] != before[:2]).any(1).all()
    gradient_TD = gradients(model, inputs)["text_padding.weight"]
    assert gradient_TD.any(1).tolist() == [False, True, True, True, True]


def test_start_vectors_lie_inside_the_counts() -> None:
    model, (text_BT, lengths_B, codes_BI) = build(), batch()
    text_BTD = model.embed_text(text_BT, lengths_B)
    image_BID = model.embed_image(codes_BI[:, :-1])
    assert text_BTD.shape[1] + image_BID.shape[1] == SHAPE.states
    assert text_BTD[0, 0].equal(model.text_start.weight[0])
    assert text_BTD[0, 2].equal(model.text_tokens.weight[text_BT[0, 1]] + model.text_positions.weight[1])
    assert image_BID[0, 0].equal(model.image_start.weight[0])
    place_D = model.image_rows.weight[1] + model.image_columns.weight[2]
    torch.testing.assert_close(image_BID[0, 7], model.image_tokens.weight[codes_BI[0, 6]] + place_D)


FULL = StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)


def test_initial_losses_at_full_vocabulary_are_9_704_and_9_011_and_9_098() -> None:
    """Exactly so where the unembeddings are zero. Those of openai/distribution_augmentation have a variance of 0.125 / width, so that logits have one of 0.125 and losses
    are higher by half of it."""
    cfg = TransformerConfig(layers=2, width=32, heads=2)
    model, inputs = build(cfg=cfg, shape=FULL), batch(FULL, 1)
    text_nll_BT, image_nll_BI = (nll.detach() for nll in model(inputs[0], torch.tensor([256]), inputs[2]))
    assert float(text_nll_BT.mean()) == pytest.approx(math.log(16384) + 0.125 / 2, abs=0.04)
    assert float(image_nll_BI.mean()) == pytest.approx(math.log(8192) + 0.125 / 2, abs=0.04)
    with torch.no_grad():
        model.text_unembedding.weight.zero_()
        model.image_unembedding.weight.zero_()
    text, image = (float(nll.detach().mean()) for nll in model(inputs[0], torch.tensor([256]), inputs[2]))
    weight = cfg.text_loss_weight
    assert [round(value, 3) for value in (text, image, weight * text + (1 - weight) * image)] == [9.704, 9.011, 9.098]


def test_padding_counts_in_the_text_loss_only_if_asked() -> None:
    inputs = batch()
    model = build()
    text_nll_BT = model(*inputs)[0]
    assert (text_nll_BT > 0).sum(1).tolist() == model.text_counts(LENGTHS).tolist() == [3, 0, 5]
    counting = build(cfg=TransformerConfig(layers=4, width=32, heads=2, conv_kernel=3, pads_in_text_loss=True))
    counted_BT = counting(*inputs)[0]
    assert (counted_BT > 0).all()
    assert counting.text_counts(LENGTHS).tolist() == [5, 5, 5]
    assert counted_BT[text_nll_BT > 0].equal(text_nll_BT[text_nll_BT > 0])
    log_p_BTV = logits(counting, *inputs)[0].log_softmax(2)
    torch.testing.assert_close(counted_BT[1], -log_p_BTV[1, :, 0])


def test_losses_are_the_cross_entropies_of_the_logits() -> None:
    model, (text_BT, lengths_B, codes_BI) = build(), batch()
    text_nll_BT, image_nll_BI = model(text_BT, lengths_B, codes_BI)
    text_BTV, image_BIN = (x.log_softmax(2) for x in logits(model, text_BT, lengths_B, codes_BI))
    torch.testing.assert_close(text_nll_BT[2], -text_BTV[2].gather(1, text_BT[2][:, None])[:, 0])
    torch.testing.assert_close(image_nll_BI, -image_BIN.gather(2, codes_BI[..., None])[..., 0])


@pytest.mark.parametrize("every", [1, 3, 8, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_recomputes_blocks_and_leaves_gradients_equal(every: int, dtype: torch.dtype) -> None:
    inputs = batch()
    plain, checkpointed = build(branch_dtype=dtype), build(branch_dtype=dtype, checkpoint_every=every)
    runs: list[int] = []
    for model in (plain, checkpointed):
        model.resblocks[0].norm.register_forward_hook(lambda *_: runs.append(1))
    a, b = gradients(plain, inputs), gradients(checkpointed, inputs)
    assert len(runs) == 1 + 2
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("scale", [2.0**13, torch.tensor(2.0**-7), 3.0])
def test_a_gradient_scale_stays_inside_its_resblock_and_leaves_all_other_gradients_alone(scale: float | Tensor) -> None:
    inputs = batch()
    model = build()
    plain = gradients(model, inputs)
    model.resblocks[3].gradient_scale = scale
    scaled = gradients(model, inputs)
    # The gradient of a key's bias is zero in exact arithmetic: errors are measured against all gradients.
    whole = torch.stack([g.norm() for g in plain.values()]).norm()
    for name in plain:
        factor = float(scale) if name.startswith("resblocks.3.") else 1.0
        assert (scaled[name] / factor - plain[name]).norm() < 1e-5 * plain[name].norm() + 1e-7 * whole, name


def test_gradients_too_small_for_fp16_survive_because_they_are_scaled_in_fp32() -> None:
    inputs = batch()

    def tiny_gradients(scale: float) -> dict[str, Tensor]:
        model = build(branch_dtype=torch.float16)
        for block in model.resblocks:
            block.gradient_scale = scale
        (model(*inputs)[1].mean() * 2.0**-20).backward()
        return {name: p.grad * 2.0**20 / scale for name, p in model.named_parameters() if name.endswith("post.weight") and p.grad is not None}

    lost, kept = tiny_gradients(1.0), tiny_gradients(2.0**20)
    reference = build()
    reference(*inputs)[1].mean().backward()
    for name in kept:
        wanted = reference.get_parameter(name).grad
        assert wanted is not None
        assert (kept[name] - wanted).norm() < 0.02 * wanted.norm(), name
        assert (lost[name] - wanted).norm() > 0.5 * wanted.norm(), name


def test_filters_stop_non_finite_gradients_at_the_resblock_that_made_them() -> None:
    inputs = batch()
    model = build()
    plain = gradients(model, inputs)
    for block in model.resblocks:
        block.filter_gradients = True
    assert all(torch.equal(plain[name], g) for name, g in gradients(model, inputs).items())
    model.resblocks[2].q.register_full_backward_hook(lambda _module, g, _out: (g[0] * float("inf"),))
    model.resblocks[5].gradient_scale = float("inf")
    broken = gradients(model, inputs)
    bad = {name.split(".")[1] for name, g in broken.items() if not g.isfinite().all()}
    assert bad == {"2"}
    assert broken["image_unembedding.weight"].isfinite().all()


def test_branches_run_in_their_own_dtype_and_everything_else_in_fp32() -> None:
    seen: dict[str, tuple[torch.dtype | None, Tensor]] = {}
    model = build(branch_dtype=torch.bfloat16)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0].dtype if args else None, out)))
    text_nll_BT, image_nll_BI = model(*batch())
    assert text_nll_BT.dtype == image_nll_BI.dtype == torch.float32
    assert seen["resblocks.0.q"][1].dtype == seen["resblocks.7.mlp_2"][1].dtype == torch.bfloat16
    for name in ("resblocks.0", "resblocks.0.norm", "resblocks.7", "final_norm", "text_unembedding", "image_unembedding"):
        assert seen[name][0] == seen[name][1].dtype == torch.float32, name
    assert all(p.dtype == torch.float32 for p in model.parameters())
    fp32_BI = build()(*batch())[1]
    assert float((image_nll_BI - fp32_BI).detach().abs().max()) < 0.05


def test_quick_gelu_is_x_times_sigmoid_of_1_702_x_and_so_is_its_gradient() -> None:
    x, y = (torch.linspace(-4, 4, 33, requires_grad=True) for _ in range(2))
    a, b = quick_gelu(x), y / (1 + torch.exp(-1.702 * y))
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_passed_norm_and_engine_are_used() -> None:
    calls: list[Kind] = []

    def engine(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        calls.append(kind)
        return v_BHSK

    model = build(norm=lambda width: torch.nn.RMSNorm(width), attend=engine)
    model(*batch())
    assert calls == ["row", "column", "row", "conv"]
    assert sum(isinstance(m, torch.nn.RMSNorm) for m in model.modules()) == 2 * 4 + 1


def test_tags_cover_every_parameter_once_and_follow_the_structure() -> None:
    model = build()
    tags = parameter_tags(model)
    assert list(tags) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert tags[name].decays == (parameter.ndim == 2), name
        assert tags[name].is_block_matrix == (parameter.ndim == 2 and name.startswith("resblocks.")), name
    assert {t.resblock for t in tags.values()} == {None, *range(8)}
    assert tags["resblocks.2.q.weight"].resblock == 2
    assert tags["resblocks.3.norm.weight"].resblock == 3
    assert tags["final_norm.weight"].resblock is None
    assert [sum(t.is_block_matrix for t in tags.values() if t.resblock == i) for i in (0, 1)] == [4, 2]


def test_mlp_2_is_stored_in_by_out_and_the_others_out_by_in() -> None:
    model = build()
    assert model.resblocks[1].mlp_1.weight.shape == (128, 32)
    assert model.resblocks[1].mlp_2.weight.shape == (128, 32)
    x_BD = torch.randn(2, 128)
    torch.testing.assert_close(model.resblocks[1].mlp_2(x_BD), x_BD @ model.resblocks[1].mlp_2.weight)
    y_BD = torch.randn(2, 32)
    torch.testing.assert_close(model.resblocks[1].mlp_1(y_BD), y_BD @ model.resblocks[1].mlp_1.weight.T)


def test_initial_matrices_have_the_spread_of_the_sibling_code() -> None:
    model = build(cfg=TransformerConfig(layers=2, width=128, heads=2, conv_kernel=3))
    wanted = {
        "resblocks.0.q": 0.125 / 128,
        "resblocks.0.post": 0.125 * 0.5 / (128 * 2),
        "resblocks.1.mlp_1": 0.125 / 128,
        "resblocks.1.mlp_2": 0.125 * 0.5 / (4 * 128 * 2),
    }
    for name, variance in wanted.items():
        assert float(model.get_parameter(f"{name}.weight").detach().std()) == pytest.approx(math.sqrt(variance), rel=0.03), name
        assert not model.get_parameter(f"{name}.bias").any()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_initial_embeddings_have_the_published_spread_times_the_scale(scale: float) -> None:
    model = build(cfg=TransformerConfig(layers=2, width=4096, heads=2, conv_kernel=3, embedding_scale=scale))
    wanted = {"text_tokens": 0.013, "image_tokens": 0.013, "text_positions": 0.01, "text_padding": 0.01}
    wanted |= {"image_rows": 0.01 / math.sqrt(2), "image_columns": 0.01 / math.sqrt(2), "text_start": 0.013, "image_start": 0.013}
    for name, std in wanted.items():
        assert float(model.get_parameter(f"{name}.weight").detach().std()) == pytest.approx(scale * std, rel=0.05), name


def test_the_default_sizes_count_12_billion_matrix_parameters() -> None:
    shape = StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
    with torch.device("meta"):
        model = Transformer(TransformerConfig(), shape, attend=lambda q, k, v, kind: q)
    tags = parameter_tags(model)
    assert sum(p.numel() for name, p in model.named_parameters() if tags[name].is_block_matrix) == 12_092_178_432
    assert sum(p.numel() for p in model.parameters()) == 12_292_816_384


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n, c: (t[:, :4], n, c), r"text has shape \(3, 4\): expected \[B, 5\], as tokenizer.max_tokens"),
        (lambda t, n, c: (t, n, c[:, :9]), r"codes have shape \(3, 9\): expected \[B, 16\], the square of grid 4 = dvae.image_size"),
        (lambda t, n, c: (t, n[:2], c), r"3 captions, lengths of shape \(2,\), codes of 3 pictures"),
        (lambda t, n, c: (t, n, c[:1]), r"3 captions, lengths of shape \(3,\), codes of 1 pictures"),
        (lambda t, n, c: (t + 40, n, c), r"text ids run from \d+ to \d+: accepted are 0 to 39, below tokenizer.vocab = 40"),
        (lambda t, n, c: (t, n + 1, c), r"caption lengths run from 1 to 6: accepted are 0 to 5, below tokenizer.max_tokens \+ 1 = 6"),
        (lambda t, n, c: (t, n, c - 24), r"image codes run from -\d+ to -\d+: accepted are 0 to 23, below dvae.vocab = 24"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_key(change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(*change(*batch()))
