"""The transformer's arithmetic when it draws. Only the states of new codes are computed; the text is computed once for each caption, and each layer caches its past
keys and values. The dVAE's decoder, which turns codes into pixels, is in model/dvae.py.

B pictures, C captions, T text and I image positions, D width, H heads, K width of a head, Q states at once, P past states, N image codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import sdpa
from model.config import StreamShape, TransformerConfig
from model.draw_cache import PastCache, Window, cache_places
from model.gumbel import gumbel_noise
from model.offsets import Kind, layer_kinds, mask_kind
from model.queries import head_norm, turn_table, turned
from model.transformer import AttentionResblock, MLPResblock, Transformer, quick_gelu

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""``linear(x_MD, weight_ED, bias_E)``, like torch's; another implementation may be faster for few rows."""

_PREFILL_STATES = 1 << 14
"""How many text states are computed at once: enough to keep a device busy, and few enough for their activations to fit beside the weights."""


@dataclass(frozen=True)
class Layer:
    """Weights of one layer in the dtype of its products; queries, keys and values in one matrix."""

    kind: Kind
    attention_norm: nn.Module
    qkv: Tensor
    qkv_bias: Tensor
    gains: tuple[Tensor, Tensor] | None
    """Those of the norms of queries and of keys (``qk_norm``)."""
    post: Tensor
    post_bias: Tensor
    mlp_norm: nn.Module
    mlp_1: Tensor
    mlp_1_bias: Tensor
    mlp_2: Tensor
    mlp_2_bias: Tensor


class DrawingWeights:
    """A trained transformer prepared for drawing: a copy of its weights that is cast once instead of in each step. Any number of batches can share it."""

    def __init__(self, model: Transformer, dtype: torch.dtype | None = None, linear: Linear = F.linear) -> None:
        """
        Args:
            model: a trained transformer; its embeddings, norms and unembedding are used directly, in fp32.
            dtype: dtype of the resblocks' products; None: the one that the model was built with.
            linear: computes these products.
        """
        self.model, self.linear = model, linear
        self.cfg: TransformerConfig = model.cfg
        self.shape: StreamShape = model.shape
        self.dtype = dtype or self.dtype_of(model)
        self.head: Tensor = model.image_unembedding.weight
        # Computed anew, because a model that was built for drawing has no memory behind its buffers.
        self.turns: Tensor | None = None
        """``turn_table`` as complex numbers, if the model has rotary positions."""
        if self.cfg.rotary_positions:
            self.turns = torch.view_as_complex(turn_table(self.cfg, self.shape).to(self.head.device, non_blocking=True))
        self.layers = [
            self._layer(kind, *model.resblocks[2 * i : 2 * i + 2])  # type: ignore[arg-type]
            for i, kind in enumerate(layer_kinds(model.cfg.layers))
        ]

    @staticmethod
    def dtype_of(model: Transformer) -> torch.dtype:
        """The dtype of the resblocks' products that a model was built with."""
        return next(block.branch_dtype for block in model.resblocks if isinstance(block, AttentionResblock))

    def _layer(self, kind: Kind, attention: AttentionResblock, mlp: MLPResblock) -> Layer:
        def cast(*tensors: Tensor) -> Tensor:
            return torch.cat(tensors).detach().to(self.dtype)

        q, k, v, post, mlp_1, mlp_2 = attention.q, attention.k, attention.v, attention.post, mlp.mlp_1, mlp.mlp_2
        return Layer(
            kind,
            attention.norm,
            cast(q.weight, k.weight, v.weight),
            cast(q.bias, k.bias, v.bias),
            None if attention.q_norm is None or attention.k_norm is None else (cast(attention.q_norm.weight), cast(attention.k_norm.weight)),
            cast(post.weight),
            cast(post.bias),
            mlp.norm,
            cast(mlp_1.weight),
            cast(mlp_1.bias),
            cast(mlp_2.weight.t()).contiguous(),
            cast(mlp_2.bias),
        )

    @property
    def device(self) -> torch.device:
        return self.layers[0].qkv.device

    def run_layer(self, layer: Layer, x_RD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """One layer on fp32 states [rows, D]; ``attend`` turns fused queries, keys and values [rows, 3 D] into [rows, D]."""
        h_RD = layer.attention_norm(x_RD).to(self.dtype)
        qkv_RE = self._normed(layer, self.linear(h_RD, layer.qkv, layer.qkv_bias))
        h_RD = self.linear(attend(qkv_RE), layer.post, layer.post_bias)
        x_RD = x_RD + h_RD.float()
        h_RD = layer.mlp_norm(x_RD).to(self.dtype)
        h_RD = self.linear(quick_gelu(self.linear(h_RD, layer.mlp_1, layer.mlp_1_bias)), layer.mlp_2, layer.mlp_2_bias)
        return x_RD + h_RD.float()

    def _normed(self, layer: Layer, qkv_RE: Tensor) -> Tensor:
        """Fused rows whose queries and keys have been normalised, if the model has norms for them."""
        if layer.gains is None:
            return qkv_RE
        q_RHK, k_RHK, v_RHK = qkv_RE.unflatten(1, (3, self.cfg.heads, -1)).unbind(1)
        return torch.stack([head_norm(q_RHK, layer.gains[0]), head_norm(k_RHK, layer.gains[1]), v_RHK], dim=1).flatten(1)

    def logits(self, x_RD: Tensor) -> Tensor:
        """Logits of the next code, fp32 [rows, N]."""
        return self.linear(self.model.final_norm(x_RD), self.head, None)

    def choose(self, scores_BQN: Tensor, seeds_B: Tensor, positions_BQ: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum of scores plus the noise of (seed, position, code), and the code with that maximum, [B, Q] each. The scores are overwritten."""
        best = scores_BQN.add_(gumbel_noise(seeds_B, positions_BQ, scores_BQN.shape[-1])).max(dim=-1)
        return best.values, best.indices

    def drawer(self, texts: Sequence[Texts]) -> Drawer:
        """A ``Drawer`` with these weights."""
        return Drawer(self, texts)


def cache_bytes(cfg: TransformerConfig, shape: StreamShape, itemsize: int, window: int = 1) -> int:
    """Bytes of keys and values for drawing one picture: in each layer the past states that its mask can still see, and the states of one pass."""
    return sum(2 * itemsize * cfg.width * (cache_places(kind, shape, cfg) + window) for kind in layer_kinds(cfg.layers))


def text_bytes(cfg: TransformerConfig, shape: StreamShape, itemsize: int) -> int:
    """Bytes of keys and values of one caption, which all its pictures share."""
    return 2 * itemsize * cfg.width * cfg.layers * shape.text_tokens


@dataclass(frozen=True)
class Texts:
    """Captions with equally many pictures each; the pictures of a caption are consecutive in the batch."""

    text_CT: Tensor
    lengths_C: Tensor
    each: int
    """Pictures of each caption."""

    @property
    def pictures(self) -> int:
        return len(self.text_CT) * self.each


class Drawer:
    """Computes the logits of the next codes of a batch of pictures, pass by pass: equal to the trained model's up to rounding, at a fraction of the cost."""

    prefill_states = _PREFILL_STATES

    def __init__(self, weights: DrawingWeights, texts: Sequence[Texts]) -> None:
        """Compute the keys and values of all captions.

        Args:
            weights: weights of the model.
            texts: groups of captions, whose pictures follow each other in the batch. Groups may have different numbers of pictures for each caption: with
                guidance, the second group is a single empty caption for all pictures.
        """
        self.weights, self.pictures = weights, sum(group.pictures for group in texts)
        shape, cfg = weights.shape, weights.cfg
        self.groups = list(texts)
        self.text = list(zip(*(self._read(group) for group in texts), strict=True))
        """For each layer and each group: keys and values [C, H, T, K]."""
        self.past = [PastCache(layer.kind, shape, cfg, self.pictures, weights.dtype, weights.device) for layer in weights.layers]
        self._new: list[tuple[Tensor, Tensor]] = []
        self._window: Window | None = None

    def storages(self) -> list[Tensor]:
        """All tensors of keys and values that are kept between passes."""
        text = [tensor for layer in self.text for pair in layer for tensor in pair]
        return [*text, *(t for past in self.past for t in (past.keys_BHRK, past.values_BHRK)), *(t for pair in self._new for t in pair)]

    def _read(self, group: Texts) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [C, H, T, K] of a group's captions, for each layer."""
        weights, text = self.weights, self.weights.shape.text_tokens
        several = max(1, self.prefill_states // text)
        parts = []
        for start in range(0, len(group.text_CT), several):
            some = slice(start, start + several)
            x_RD = weights.model.embed_text(group.text_CT[some], group.lengths_C[some]).flatten(0, 1)
            kept: list[tuple[Tensor, Tensor]] = []

            def attend(qkv_RE: Tensor, kept: list[tuple[Tensor, Tensor]] = kept) -> Tensor:
                q_CHTK, k_CHTK, v_CHTK = self._heads(qkv_RE, text, None if weights.turns is None else weights.turns[:, :text])
                kept.append((k_CHTK.contiguous(), v_CHTK.contiguous()))
                return sdpa.attention(q_CHTK, k_CHTK, v_CHTK, is_causal=True).transpose(1, 2).reshape(len(qkv_RE), -1)

            for layer in weights.layers:
                x_RD = weights.run_layer(layer, x_RD, attend)
            parts.append(kept)
        return [(torch.cat([part[i][0] for part in parts]), torch.cat([part[i][1] for part in parts])) for i in range(len(weights.layers))]

    def _heads(self, qkv_RE: Tensor, states: int, turns: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Fused rows [B Q, 3 D] to queries, keys and values [B, H, Q, K]; the first two turned by these tables, which broadcast to [2, B, H, Q, K/2]."""
        split = qkv_RE.view(-1, states, 3, self.weights.cfg.heads, self.weights.cfg.width // self.weights.cfg.heads).permute(2, 0, 3, 1, 4)
        if turns is None:
            return split[0], split[1], split[2]
        return turned(split[0], turns[0]), turned(split[1], turns[1]), split[2]

    def _turns(self, window: Window) -> Tensor | None:
        """The tables of ``_heads`` for a window."""
        if self.weights.turns is None:
            return None
        shape = self.weights.shape
        return self.weights.turns[:, shape.text_tokens + window.states_BQ.clamp(max=shape.image_tokens - 1)].unsqueeze(2)

    def logits(self, codes_BI: Tensor, window: Window) -> Tensor:
        """Logits fp32 [B, Q, N] of the codes at the window's positions, given all codes before each position, which may be drafts.

        Args:
            codes_BI: int64; codes at and after the window's last position are not read.
            window: the positions. Logits at positions beyond the end of the picture have no meaning.
        """
        x_RD = self._run(codes_BI, window)
        return self.weights.logits(x_RD).view(self.pictures, window.length, -1)

    def fill(self, codes_BI: Tensor, count: int) -> None:
        """Compute and keep the first ``count`` states, whose codes are given, one row of the picture in each pass."""
        for first in range(0, count, self.weights.shape.grid):
            length = min(self.weights.shape.grid, count - first)
            window = Window(torch.full((self.pictures,), first, device=codes_BI.device), length, first)
            self._run(codes_BI, window)
            self.keep(torch.full((self.pictures,), length, device=codes_BI.device))

    def keep(self, counts_B: Tensor) -> None:
        """End a pass, and keep its first ``counts_B`` states, whose inputs turned out to be right.

        If a pass has a single state at the same position in all pictures, it is kept already, because its input is always right.
        """
        assert self._window is not None
        if self._new:
            for past, (k_BHQK, v_BHQK) in zip(self.past, self._new, strict=True):
                past.keep(self._window, counts_B, k_BHQK, v_BHQK)
        self._new, self._window = [], None

    def select(self, index_B: Tensor) -> None:
        """Go on from the past of the pictures ``index_B``. The cache is rewritten in place, because others may hold views of it."""
        for past in self.past:
            for kept_BHRK in (past.keys_BHRK, past.values_BHRK):
                kept_BHRK.copy_(kept_BHRK[index_B])

    def _run(self, codes_BI: Tensor, window: Window) -> Tensor:
        self._new, self._window = [], window
        x_RD = self._embed(codes_BI, window).flatten(0, 1)
        one = window.common if window.length == 1 else None
        seen: dict[Kind, Tensor] = {}
        is_before_QQ, turns = self._before(window), self._turns(window)
        for index, layer in enumerate(self.weights.layers):
            past = self.past[index]
            if one is None and layer.kind not in seen:
                seen[layer.kind] = past.visible(window)

            def attend(qkv_RE: Tensor, index: int = index, past: PastCache = past, kind: Kind = layer.kind) -> Tensor:
                q_BHQK, k_BHQK, v_BHQK = self._heads(qkv_RE, window.length, turns)
                q_BHQK = q_BHQK * q_BHQK.shape[-1] ** -0.5
                if one is not None:
                    out_BHQK = self._attend_one(index, past, q_BHQK, k_BHQK, v_BHQK, one)
                    past.keep_one(one, k_BHQK, v_BHQK)
                else:
                    out_BHQK = self._attend_window(index, past, q_BHQK, k_BHQK, v_BHQK, seen[kind], is_before_QQ[kind])
                    self._new.append((k_BHQK, v_BHQK))
                return out_BHQK.transpose(1, 2).reshape(len(qkv_RE), -1)

            x_RD = self.weights.run_layer(layer, x_RD, attend)
        return x_RD

    def _embed(self, codes_BI: Tensor, window: Window) -> Tensor:
        model, grid = self.weights.model, self.weights.shape.grid
        before_BQ = (window.states_BQ - 1).clamp(max=codes_BI.shape[1] - 1)
        at_BQ = before_BQ.clamp(min=0)
        x_BQD = model.image_tokens(codes_BI.gather(1, at_BQ)) + (model.image_rows(at_BQ // grid) + model.image_columns(at_BQ % grid))
        return torch.where((before_BQ < 0)[..., None], model.image_start(), x_BQD)

    def _before(self, window: Window) -> dict[Kind, Tensor]:
        """Which states of a window attend to which other states of it, bool [Q, Q] for each mask."""
        step_Q = torch.arange(window.length, device=window.first_B.device)
        back_QQ = step_Q[:, None] - step_Q
        return {past.kind: (back_QQ >= 0) & past.is_allowed_I[back_QQ.clamp(min=0)] for past in self.past}

    def _text_scores(self, index: int, q_BHQK: Tensor) -> Tensor:
        """Scores [B, H, Q, T] of every state with its caption. The pictures of a caption become rows of a single matrix product."""
        parts = []
        for q_bHQK, group, (keys_CHTK, _) in zip(self._split(q_BHQK), self.groups, self.text[index], strict=True):
            rows_CHEK = _by_caption(q_bHQK, group.each)
            parts.append(_by_picture(rows_CHEK @ keys_CHTK.transpose(-1, -2), group.each, q_BHQK.shape[2]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _text_values(self, index: int, p_BHQT: Tensor) -> Tensor:
        parts = []
        for p_bHQT, group, (_, values_CHTK) in zip(self._split(p_BHQT), self.groups, self.text[index], strict=True):
            parts.append(_by_picture(_by_caption(p_bHQT, group.each) @ values_CHTK, group.each, p_BHQT.shape[2]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _split(self, x_B: Tensor) -> Sequence[Tensor]:
        return [x_B] if len(self.groups) == 1 else x_B.split([group.pictures for group in self.groups])

    def _attend_one(self, index: int, past: PastCache, q_BH1K: Tensor, k_BH1K: Tensor, v_BH1K: Tensor, first: int) -> Tensor:
        """Attention of one state of each picture, at the same position in all: the past is a slice of the cache, and nothing has to be gathered."""
        keys_BHPK, values_BHPK, is_seen_P = past.one_state(first)
        past_BH1P = q_BH1K @ keys_BHPK.transpose(-1, -2)
        if is_seen_P is not None:
            past_BH1P = past_BH1P.masked_fill(~is_seen_P, float("-inf"))
        self_BH11 = (q_BH1K * k_BH1K).sum(-1, keepdim=True)
        text_BH1T = self._text_scores(index, q_BH1K)
        sizes = [text_BH1T.shape[-1], past_BH1P.shape[-1], 1]
        p_BH1T, p_BH1P, p_BH11 = torch.cat([text_BH1T, past_BH1P, self_BH11], dim=-1).softmax(-1).split(sizes, dim=-1)
        return self._text_values(index, p_BH1T) + p_BH1P @ values_BHPK + p_BH11 * v_BH1K

    def _attend_window(
        self, index: int, past: PastCache, q_BHQK: Tensor, k_BHQK: Tensor, v_BHQK: Tensor, is_seen_BQP: Tensor, is_before_QQ: Tensor
    ) -> Tensor:
        """Attention of several states of each picture, which begin at another position in each picture."""
        window = self._window
        assert window is not None
        is_column = mask_kind(past.kind).is_transposed
        keys = past.columns(past.keys_BHRK, window) if is_column else past.keys_BHRK
        past_BHQP = (q_BHQK[..., None, :] @ keys.transpose(-1, -2))[..., 0, :] if is_column else q_BHQK @ keys.transpose(-1, -2)
        past_BHQP = past_BHQP.masked_fill(~is_seen_BQP[:, None], float("-inf"))
        new_BHQQ = (q_BHQK @ k_BHQK.transpose(-1, -2)).masked_fill(~is_before_QQ, float("-inf"))
        text_BHQT = self._text_scores(index, q_BHQK)
        sizes = [text_BHQT.shape[-1], past_BHQP.shape[-1], window.length]
        p_BHQT, p_BHQP, p_BHQQ = torch.cat([text_BHQT, past_BHQP, new_BHQQ], dim=-1).softmax(-1).split(sizes, dim=-1)
        out_BHQK = self._text_values(index, p_BHQT) + p_BHQQ @ v_BHQK
        if is_column:
            return out_BHQK + (p_BHQP[..., None, :] @ past.columns(past.values_BHRK, window))[..., 0, :]
        return out_BHQK + p_BHQP @ past.values_BHRK


def _by_caption(x_BHQX: Tensor, each: int) -> Tensor:
    """[C each, H, Q, X] to [C, H, each Q, X]."""
    return x_BHQX.unflatten(0, (-1, each)).transpose(1, 2).flatten(2, 3)


def _by_picture(x_CHEX: Tensor, each: int, states: int) -> Tensor:
    """The inverse of ``_by_caption``."""
    return x_CHEX.unflatten(2, (each, states)).transpose(1, 2).flatten(0, 1)
