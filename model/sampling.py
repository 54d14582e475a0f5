"""Drawing image codes from a trained transformer, one position after the other, with a static cache of keys and values.

B pictures, T text and I image positions, S = T + I states, P given codes, N image codes, H heads, K width of a head, Q states at once,
V image states that one image state visits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.masks import CachePlan, Kind, cache_plan, dense_mask, layer_kinds
from model.transformer import Transformer


class CachedAttention:
    """Engine of one layer: attends from new states to the states so far that its mask allows, whose keys and values it keeps."""

    def __init__(self, mask_SS: Tensor, plan: CachePlan, text_tokens: int) -> None:
        self.mask_SS, self.plan, self.text_tokens = mask_SS, plan, text_tokens
        self.filled = 0
        self.keys_BHSK: Tensor | None = None
        self.values_BHSK: Tensor | None = None

    def __call__(self, q_BHQK: Tensor, k_BHQK: Tensor, v_BHQK: Tensor, kind: Kind) -> Tensor:
        if self.keys_BHSK is None or self.values_BHSK is None:
            batch, heads, _, width = k_BHQK.shape
            self.keys_BHSK = k_BHQK.new_zeros(batch, heads, len(self.mask_SS), width)
            self.values_BHSK = torch.zeros_like(self.keys_BHSK)
        end = self.filled + q_BHQK.shape[2]
        self.keys_BHSK[:, :, self.filled : end] = k_BHQK
        self.values_BHSK[:, :, self.filled : end] = v_BHQK
        begin, self.filled = self.filled, end
        if end - begin == 1 and begin >= self.text_tokens:
            return self._visit(q_BHQK, self.keys_BHSK, self.values_BHSK, begin - self.text_tokens)
        mask_QS = self.mask_SS[begin:end, :end]
        return F.scaled_dot_product_attention(q_BHQK, self.keys_BHSK[:, :, :end], self.values_BHSK[:, :, :end], attn_mask=mask_QS)

    def _visit(self, q_BH1K: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, position: int) -> Tensor:
        """One image state: all text, and of the image only what the plan visits."""
        visited, is_allowed_V = self.plan.visit(position)
        image = slice(self.text_tokens + visited.start, self.text_tokens + visited.stop, visited.step)
        q_BH1K = q_BH1K * q_BH1K.shape[-1] ** -0.5
        text_BH1T = q_BH1K @ k_BHSK[:, :, : self.text_tokens].transpose(-1, -2)
        image_BH1V = q_BH1K @ k_BHSK[:, :, image].transpose(-1, -2)
        if is_allowed_V is not None:
            image_BH1V = image_BH1V.masked_fill(~is_allowed_V.to(q_BH1K.device), float("-inf"))
        p_BH1T, p_BH1V = torch.cat([text_BH1T, image_BH1V], dim=-1).softmax(-1).split([self.text_tokens, image_BH1V.shape[-1]], dim=-1)
        return p_BH1T @ v_BHSK[:, :, : self.text_tokens] + p_BH1V @ v_BHSK[:, :, image]


class CodePredictor:
    """The logits of the next image code, state by state: equal to ``Transformer.logits`` up to rounding, at a fraction of its cost."""

    def __init__(self, model: Transformer, text_BT: Tensor, lengths_B: Tensor) -> None:
        kinds = layer_kinds(model.cfg.layers)
        masks = {kind: dense_mask(kind, model.shape, model.cfg).to(text_BT.device) for kind in set(kinds)}
        plans = {kind: cache_plan(kind, model.shape, model.cfg) for kind in set(kinds)}
        self._model = model
        self._engines = [CachedAttention(masks[kind], plans[kind], model.shape.text_tokens) for kind in kinds]
        self._seen = 0
        self._waiting_BTD: Tensor | None = model.embed_text(text_BT, lengths_B)

    def __call__(self, codes_BP: Tensor) -> Tensor:
        """Logits fp32 [B, N] of code P, given all codes before it; each call gives at least one code more than the call before."""
        new_BQD = self._model.embed_image(codes_BP)[:, self._seen :]
        self._seen = codes_BP.shape[1] + 1
        if self._waiting_BTD is not None:
            new_BQD, self._waiting_BTD = torch.cat([self._waiting_BTD, new_BQD], dim=1), None
        for index, block in enumerate(self._model.resblocks):
            new_BQD = block(new_BQD, self._engines[index // 2])
        logits_BN: Tensor = self._model.image_unembedding(self._model.final_norm(new_BQD[:, -1]))
        return logits_BN


@torch.no_grad()
def sample(
    model: Transformer,
    text_BT: Tensor,
    lengths_B: Tensor,
    generators: list[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    prefix_codes: Tensor | None = None,
) -> Tensor:
    """Draw pictures for captions, as codes int64 [B, I] in raster order (paper 2.6: temperature 1, no filtering).

    Each picture takes one uniform number per position from its own generator, so it depends on its caption and its seed, not on the
    pictures drawn beside it.

    Args:
        model: a trained transformer.
        text_BT: text ids, int64 [B, T].
        lengths_B: tokens of each caption, int64 [B].
        generators: one for each picture, on any device.
        temperature: divides the logits; above 0.
        top_k: draw among the k likeliest codes only.
        prefix_codes: codes that are given, int64 [B, P], the first P of the picture (paper 3.3: the upper part of a photo).

    Raises:
        ValueError: generators or given codes that do not fit the captions; a temperature or top_k that cannot be drawn with.
    """
    shape = model.shape
    if len(generators) != len(text_BT):
        raise ValueError(f"{len(generators)} generators for {len(text_BT)} captions: one for each picture is needed")
    if temperature <= 0:
        raise ValueError(f"generate.temperature = {temperature}: must be above 0")
    if top_k is not None and not 1 <= top_k <= shape.image_vocab:
        raise ValueError(f"top_k = {top_k}: accepted are 1 to dvae.vocab = {shape.image_vocab}")
    codes_BP = text_BT.new_empty(len(text_BT), 0) if prefix_codes is None else prefix_codes
    if codes_BP.ndim != 2 or len(codes_BP) != len(text_BT) or codes_BP.shape[1] > shape.image_tokens:
        raise ValueError(f"prefix_codes have shape {tuple(codes_BP.shape)}: expected [{len(text_BT)}, at most {shape.image_tokens}]")
    uniform_BI = torch.stack([torch.rand(shape.image_tokens, generator=g, device=g.device, dtype=torch.float64).cpu() for g in generators])
    uniform_BI = uniform_BI.to(text_BT.device)
    predict = CodePredictor(model, text_BT, lengths_B)
    for position in range(codes_BP.shape[1], shape.image_tokens):
        next_B = _draw(predict(codes_BP) / temperature, uniform_BI[:, position], top_k)
        codes_BP = torch.cat([codes_BP, next_B[:, None]], dim=1)
    return codes_BP


def _draw(logits_BN: Tensor, uniform_B: Tensor, top_k: int | None) -> Tensor:
    """Codes by inverting the cumulative distribution at the uniform numbers, int64 [B]."""
    if top_k is not None:
        least_B1 = logits_BN.topk(top_k, dim=1).values[:, -1:]
        logits_BN = logits_BN.masked_fill(logits_BN < least_B1, float("-inf"))
    cumulative_BN = logits_BN.double().softmax(1).cumsum(1)
    # Times the last sum, which rounding leaves beside 1; right=True, so that codes of probability 0 are never drawn.
    target_B1 = uniform_B[:, None] * cumulative_BN[:, -1:]
    return torch.searchsorted(cumulative_BN, target_B1, right=True)[:, 0].clamp_(max=logits_BN.shape[1] - 1)
