"""The decoder-only transformer over one stream of text and image tokens (paper 2.2, 2.4, B.1; Child et al. 2019, section 5.2).

B batch, T text positions, I image positions, S = T + I states, D width, H heads, K width of a head, V text vocabulary, N image codes.
The layout of parameters is specified in docs/contracts.md, section 4.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Attend, DenseAttention
from model.config import StreamShape, TransformerConfig
from model.head import Unembedding
from model.offsets import Kind, layer_kinds
from model.queries import HeadNorm, RotaryAttention
from model.starts import normal_
from model.width import WidthRatios, width_ratios

# Initialisation as in code that the same group has published (distribution augmentation); the paper does not give it.
_WEIGHT_VARIANCE = 0.125
_TOKEN_STD = 0.013
_POSITION_STD = 0.01

Norm = Callable[[int], nn.Module]


class _Scale(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor; with ``filters``, infinities and NaN in the gradient become 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor, filters: bool) -> Tensor:
        ctx.factor, ctx.filters = factor, filters
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0] * ctx.factor
        return (grad.nan_to_num(0.0, 0.0, 0.0) if ctx.filters else grad), None, None


def enter(y: Tensor, scale: float | Tensor, filters: bool) -> Tensor:
    """First gradient point, after the branch's cast to fp32: on its way into the branch the gradient is scaled and filtered (Figure 4)."""
    return y if _is_idle(scale, filters) else _Scale.apply(y, scale, filters)


def leave(x: Tensor, scale: float | Tensor, filters: bool) -> Tensor:
    """Second gradient point, before the norm: on its way out of the branch the gradient is unscaled and filtered (Figure 4)."""
    return x if _is_idle(scale, filters) else _Scale.apply(x, 1 / scale, filters)


def _is_idle(scale: float | Tensor, filters: bool) -> bool:
    # The scale may be a tensor on a device; reading its value would wait for the device.
    return not filters and not isinstance(scale, Tensor) and scale == 1.0


class Projection(nn.Module):
    """A matrix and a bias, stored in fp32 and cast to the dtype of the input. The matrix is stored as (out, in), or (in, out) if ``transposed``."""

    def __init__(self, inputs: int, outputs: int, std: float, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.weight = nn.Parameter(torch.empty((inputs, outputs) if transposed else (outputs, inputs)))
        self.bias = nn.Parameter(torch.zeros(outputs))
        normal_(self.weight, std)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return F.linear(x, weight.t() if self.transposed else weight, self.bias.to(x.dtype))


class Table(nn.Module):
    """Learned vectors, (count, D); returns those of some ids, or all."""

    def __init__(self, count: int, width: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))
        normal_(self.weight, std)

    def forward(self, ids: Tensor | None = None) -> Tensor:
        return self.weight if ids is None else F.embedding(ids, self.weight)


class Resblock(nn.Module):
    """``x + branch(norm(x))``: identity path and norm in fp32, the branch in its own dtype, with the two gradient points of Figure 4.

    ``gradient_scale`` multiplies every parameter gradient inside the block (including the norm's); the optimizer has to divide by it again. It is a float, or a
    0-dimensional tensor on the device of the states. With scale 1 and ``filter_gradients`` off, the gradient points do nothing.
    """

    def __init__(self, norm: nn.Module, branch_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.branch_dtype = branch_dtype
        self.gradient_scale: float | Tensor = 1.0
        self.filter_gradients = False

    @abstractmethod
    def branch(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        """What the block adds to the states, [B, S, D], computed from normalised states [B, S, D] in the branch's dtype."""

    def forward(self, x_BSD: Tensor, attend: Attend) -> Tensor:
        """One block on fp32 states [B, S, D]."""
        h_BSD = self.norm(leave(x_BSD, self.gradient_scale, self.filter_gradients)).to(self.branch_dtype)
        y_BSD = self.branch(h_BSD, attend).to(x_BSD.dtype)
        return x_BSD + enter(y_BSD, self.gradient_scale, self.filter_gradients)


class AttentionResblock(Resblock):
    """Multi-head self-attention under one of the masks."""

    def __init__(self, cfg: TransformerConfig, kind: Kind, norm: nn.Module, branch_dtype: torch.dtype) -> None:
        super().__init__(norm, branch_dtype)
        self.kind, self.heads = kind, cfg.heads
        std = math.sqrt(_WEIGHT_VARIANCE / cfg.width)
        # Scores are multiplied by a ratio of the widths of heads (model/width.py) where queries get their size: in the norm's gain if there is one.
        matrix, gain = (1.0, cfg.score_ratio) if cfg.qk_norm else (cfg.score_ratio, 1.0)
        self.q, self.k, self.v = (Projection(cfg.width, cfg.width, std * ratio) for ratio in (matrix, 1.0, 1.0))
        # Half the variance, divided by the number of layers, so that the size of the residual sum does not depend on the depth.
        self.post = Projection(cfg.width, cfg.width, std * math.sqrt(0.5 / cfg.layers) * (not cfg.zero_projections))
        self.q_norm, self.k_norm = (HeadNorm(cfg.width // cfg.heads, start) if cfg.qk_norm else None for start in (gain, 1.0))

    def branch(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        q_BSHK, k_BSHK, v_BSHK = (p(h_BSD).unflatten(2, (self.heads, -1)) for p in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHK, k_BSHK = self.q_norm(q_BSHK), self.k_norm(k_BSHK)
        out_BHSK = attend(q_BSHK.transpose(1, 2), k_BSHK.transpose(1, 2), v_BSHK.transpose(1, 2), self.kind)
        y_BSD: Tensor = self.post(out_BHSK.transpose(1, 2).flatten(2))
        return y_BSD


class MLPResblock(Resblock):
    """Two matrices with a quick GELU between them; the inner width is four times the outer one."""

    def __init__(self, cfg: TransformerConfig, norm: nn.Module, branch_dtype: torch.dtype) -> None:
        super().__init__(norm, branch_dtype)
        std = math.sqrt(_WEIGHT_VARIANCE / cfg.width)
        self.mlp_1 = Projection(cfg.width, 4 * cfg.width, std)
        self.mlp_2 = Projection(4 * cfg.width, cfg.width, std * math.sqrt(0.5 / (4 * cfg.layers)) * (not cfg.zero_projections), transposed=True)

    def branch(self, h_BSD: Tensor, attend: Attend) -> Tensor:
        y_BSD: Tensor = self.mlp_2(quick_gelu(self.mlp_1(h_BSD)))
        return y_BSD


class _QuickGELU(torch.autograd.Function):
    """Written by hand, because it keeps one tensor for the backward pass where autograd keeps three, and needs fewer passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scaled = x * 1.702  # kept instead of x, which nothing else needs
        ctx.save_for_backward(scaled)
        return F.silu(scaled).mul_(1 / 1.702)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0], scaled)


def quick_gelu(x: Tensor) -> Tensor:
    """``x * sigmoid(1.702 x)`` (Child et al.)."""
    return _QuickGELU.apply(x)


class Transformer(nn.Module):
    """Text and image tokens to the negative log-likelihood of each.

    State j of the text predicts text token j from the tokens before it; state p of the image predicts code p from the whole text and the codes before it. The
    start vectors are included in the numbers of positions (docs/paper.md 3.4): the input of text slot 0 is start-of-text, that of slot j is token j - 1 with its
    position; the input of image slot 0 is start-of-image, that of slot p is code p - 1 with its row and column. A text slot without a token holds a learned
    padding vector of its position, to which image states do attend. If a caption fills all text positions, its last token is predicted but is never an input.
    """

    def __init__(
        self,
        cfg: TransformerConfig,
        shape: StreamShape,
        *,
        branch_dtype: torch.dtype = torch.float32,
        norm: Norm | None = None,
        attend: Attend | None = None,
        checkpoint_every: int = 0,
        z_loss: float = 0.0,
        logits_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build and initialise the model in fp32.

        Args:
            cfg: sizes.
            shape: the token stream.
            branch_dtype: arithmetic of the residual branches; everything else is fp32, but for ``logits_dtype``.
            norm: makes a norm of a given width; layer norm with eps 1e-5 if None.
            attend: the attention engine (a module, if it holds buffers); DenseAttention if None.
            checkpoint_every: keep only the states before every n-th resblock, and recompute the resblocks in between (and the logits) in the backward pass (paper
                2.4 recomputes each resblock: 1); 0 keeps everything.
            z_loss: see ``cross_entropy``.
            logits_dtype: what the heads' matrix products read in training: ``products`` of ``cross_entropy``.
        """
        super().__init__()
        self.cfg, self.shape, self.checkpoint_every = cfg, shape, checkpoint_every
        make_norm = norm or (lambda width: nn.LayerNorm(width, eps=1e-5))
        self.attend = attend or DenseAttention(cfg, shape)
        if cfg.rotary_positions:
            self.attend = RotaryAttention(cfg, shape, self.attend)
        width, token_std, position_std = cfg.width, cfg.embedding_scale * _TOKEN_STD, cfg.embedding_scale * _POSITION_STD
        self.text_tokens = Table(shape.text_vocab, width, token_std)
        self.text_positions = Table(shape.text_tokens, width, position_std)
        self.text_padding = Table(shape.text_tokens, width, position_std)
        self.text_start = Table(1, width, token_std)
        self.image_tokens = Table(shape.image_vocab, width, token_std)
        self.image_rows = Table(shape.grid, width, position_std / math.sqrt(2))
        self.image_columns = Table(shape.grid, width, position_std / math.sqrt(2))
        self.image_start = Table(1, width, token_std)
        blocks: list[Resblock] = []
        for kind in layer_kinds(cfg.layers):
            blocks.append(AttentionResblock(cfg, kind, make_norm(width), branch_dtype))
            blocks.append(MLPResblock(cfg, make_norm(width), branch_dtype))
        self.resblocks = nn.ModuleList(blocks)
        self.final_norm = make_norm(width)
        variance = _WEIGHT_VARIANCE / cfg.width_ratio  # of unembeddings it falls with the square of the width (model/width.py)
        self.text_unembedding = Unembedding(width, shape.text_vocab, variance, z_loss, logits_dtype)
        self.image_unembedding = Unembedding(width, shape.image_vocab, variance, z_loss, logits_dtype)

    def embed_text(self, text_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Input states of the text slots, fp32 [B, T, D]."""
        slot_T = torch.arange(self.shape.text_tokens, device=text_BT.device)
        token_BTD = self.text_tokens(text_BT[:, :-1]) + self.text_positions()[:-1]
        shifted_BTD = torch.cat([self.text_start().expand(len(text_BT), 1, -1), token_BTD], dim=1)
        is_padding_BT = slot_T > lengths_B[:, None]
        return torch.where(is_padding_BT[..., None], self.text_padding(), shifted_BTD)

    def embed_image(self, codes_BP: Tensor) -> Tensor:
        """Input states of image slots 0 to P, given codes 0 to P - 1, fp32 [B, P + 1, D]."""
        position_P = torch.arange(codes_BP.shape[1], device=codes_BP.device)
        place_PD = self.image_rows(position_P // self.shape.grid) + self.image_columns(position_P % self.shape.grid)
        start_B1D = self.image_start().expand(len(codes_BP), 1, -1)
        return torch.cat([start_B1D, self.image_tokens(codes_BP) + place_PD], dim=1)

    def states(self, text_BT: Tensor, lengths_B: Tensor, codes_BI: Tensor) -> Tensor:
        """States after all resblocks and before the last norm, fp32 [B, S, D]."""
        x_BSD = torch.cat([self.embed_text(text_BT, lengths_B), self.embed_image(codes_BI[:, :-1])], dim=1)
        if not self.checkpoint_every or not torch.is_grad_enabled():
            return self._run(0, len(self.resblocks), x_BSD)
        for first in range(0, len(self.resblocks), self.checkpoint_every):
            last = min(first + self.checkpoint_every, len(self.resblocks))
            x_BSD = checkpoint(self._run, first, last, x_BSD, use_reentrant=False, preserve_rng_state=False)
        return x_BSD

    def _run(self, first: int, last: int, x_BSD: Tensor) -> Tensor:
        for block in list(self.resblocks)[first:last]:
            x_BSD = block(x_BSD, self.attend)
        return x_BSD

    def predicting_states(self, text_BT: Tensor, lengths_B: Tensor, codes_BI: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised states from which text and image tokens are predicted, fp32 [B, T, D] and [B, I, D]. Arguments and errors as in ``forward``."""
        self._check(text_BT, lengths_B, codes_BI)
        x_BSD = self.final_norm(self.states(text_BT, lengths_B, codes_BI))
        text_BTD, image_BID = x_BSD.split([self.shape.text_tokens, self.shape.image_tokens], dim=1)
        return text_BTD, image_BID

    def forward(
        self,
        text_BT: Tensor,
        lengths_B: Tensor,
        codes_BI: Tensor,
        read_text_BT: Tensor | None = None,
        read_codes_BI: Tensor | None = None,
        *,
        temperatures: Sequence[float] = (),
    ) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood in nats of each token, fp32 [B, T] and [B, I]. The caller takes means, with its own denominators.

        Text positions that do not count (see ``text_counts``) are exactly 0.

        Args:
            text_BT: text ids, int64 [B, T]; ids beyond a caption's length are ignored.
            lengths_B: number of tokens of each caption, int64 [B], 0 to T.
            codes_BI: image codes in raster order, int64 [B, I].
            read_text_BT: text ids that are read as inputs instead of ``text_BT``, which stays what is predicted.
            read_codes_BI: the same for ``codes_BI``.
            temperatures: if given, what the image's logits are divided by; codes then have a likelihood at each, fp32 [B, I, temperatures].

        Raises:
            ValueError: shapes are wrong, or ids or lengths out of range (which is checked for CPU tensors only, because on a device the host would have to wait).
        """
        if read_text_BT is not None or read_codes_BI is not None:
            self._check(text_BT, lengths_B, codes_BI)  # else the inputs, which are checked where they are read
        read_text_BT = text_BT if read_text_BT is None else read_text_BT
        read_codes_BI = codes_BI if read_codes_BI is None else read_codes_BI
        text_BTD, image_BID = self.predicting_states(read_text_BT, lengths_B, read_codes_BI)
        keeps_logits = not self.checkpoint_every
        is_token_BT = torch.arange(self.shape.text_tokens, device=text_BT.device) < lengths_B[:, None]
        text_nll_BT = self.text_unembedding(text_BTD, text_BT.where(is_token_BT, 0), keeps_logits)
        if not self.cfg.pads_in_text_loss:
            text_nll_BT = text_nll_BT.where(is_token_BT, 0.0)
        if temperatures:
            # Logits are linear in the states, which may carry the factor.
            at = [self.image_unembedding(image_BID * (1 / temperature), codes_BI, False) for temperature in temperatures]
            return text_nll_BT, torch.stack(at, 2)
        return text_nll_BT, self.image_unembedding(image_BID, codes_BI, keeps_logits)

    def text_counts(self, lengths_B: Tensor) -> Tensor:
        """Number of text positions of each caption that count in the loss, int64 [B]. Their sum over all ranks is the denominator of the text loss."""
        return torch.full_like(lengths_B, self.shape.text_tokens) if self.cfg.pads_in_text_loss else lengths_B

    def _check(self, text_BT: Tensor, lengths_B: Tensor, codes_BI: Tensor) -> None:
        shape = self.shape
        if text_BT.ndim != 2 or text_BT.shape[1] != shape.text_tokens:
            raise ValueError(f"text has shape {tuple(text_BT.shape)}: expected [B, {shape.text_tokens}], as tokenizer.max_tokens says")
        if codes_BI.ndim != 2 or codes_BI.shape[1] != shape.image_tokens:
            raise ValueError(
                f"codes have shape {tuple(codes_BI.shape)}: expected [B, {shape.image_tokens}], "
                f"the square of grid {shape.grid} = dvae.image_size / dvae.downsample"
            )
        if lengths_B.shape != (len(text_BT),) or len(codes_BI) != len(text_BT):
            raise ValueError(f"{len(text_BT)} captions, lengths of shape {tuple(lengths_B.shape)}, codes of {len(codes_BI)} pictures: must agree")
        _check_range("text ids", text_BT, shape.text_vocab, "tokenizer.vocab")
        _check_range("caption lengths", lengths_B, shape.text_tokens + 1, "tokenizer.max_tokens + 1")
        _check_range("image codes", codes_BI, shape.image_vocab, "dvae.vocab")


def _check_range(what: str, ids: Tensor, bound: int, key: str) -> None:
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= bound:
        raise ValueError(f"{what} run from {low} to {high}: accepted are 0 to {bound - 1}, below {key} = {bound}")


@dataclass(frozen=True)
class ParameterTag:
    """What training needs to know about a parameter."""

    resblock: int | None
    """Index of its resblock, 0 to 2 * layers - 1 (attention even, MLP odd); None outside resblocks."""
    decays: bool
    """Whether weight decay applies: to matrices and tables (rank above 1, as in openai/distribution_augmentation), not to gains and biases."""
    is_block_matrix: bool
    """Whether it is a matrix of a resblock. 16-bit storage and moments, fp16 messages and gradient compression apply to these only (paper D.2)."""
    ratios: WidthRatios
    """What its step size and decay are scaled by (``dalle.base_width``)."""


def parameter_tags(model: Transformer) -> dict[str, ParameterTag]:
    """A tag for every parameter of the model, by name. Derived from the structure only, because under ZeRO 3 shapes are partitioned."""
    tags = {}
    for name, _ in model.named_parameters():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        is_matrix = leaf == "weight" and isinstance(owner, Projection | Unembedding | Table)
        resblock = int(name.split(".")[1]) if name.startswith("resblocks.") else None
        is_block_matrix = is_matrix and resblock is not None
        ratios = width_ratios(model.cfg, name, is_block_matrix=is_block_matrix)
        tags[name] = ParameterTag(resblock=resblock, decays=is_matrix, is_block_matrix=is_block_matrix, ratios=ratios)
    return tags
