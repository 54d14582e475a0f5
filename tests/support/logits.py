"""Logits of every position at once: what the cached sampler and the loss are compared to."""

from torch import Tensor

from model.transformer import Transformer


def logits(model: Transformer, text_BT: Tensor, lengths_B: Tensor, codes_BI: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of every text and image position, fp32 [B, T, V] and [B, I, N]."""
    text_BTD, image_BID = model.predicting_states(text_BT, lengths_B, codes_BI)
    return model.text_unembedding(text_BTD), model.image_unembedding(image_BID)
