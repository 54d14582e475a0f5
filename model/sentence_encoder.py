"""A sentence encoder of BERT's architecture (Devlin et al. 2019) with a mean over its states (Reimers and Gurevych 2019), which captions are read with in place of a
learned text tower.

B texts, T pieces of each, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = 512
"""Places that BERT knows."""


class SentenceEncoder(nn.Module):
    """Pieces of words to one unit vector for each text."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, inner: int, positions: int = POSITIONS) -> None:
        super().__init__()
        self.tokens, self.token_positions, self.kinds = nn.Embedding(vocab, width), nn.Embedding(positions, width), nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        layer = nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, text_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Ids int64 [B, T], padded behind ``lengths_B`` of them, to unit vectors fp32 [B, D]. Padding has no effect."""
        is_token_BT = torch.arange(text_BT.shape[1], device=text_BT.device) < lengths_B[:, None]
        x_BTD = self.tokens(text_BT) + self.token_positions.weight[: text_BT.shape[1]] + self.kinds.weight[0]
        x_BTD = self.blocks(self.norm(x_BTD), src_key_padding_mask=~is_token_BT)
        mean_BD = (x_BTD * is_token_BT[..., None]).sum(1) / is_token_BT.sum(1, keepdim=True)
        return F.normalize(mean_BD, dim=1)


def from_bert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a ``SentenceEncoder`` from tensors by the names of transformers' BertModel. The pooling layer, which a mean replaces, is left out.

    Raises:
        KeyError: a tensor is missing.
    """
    found = {
        "tokens.weight": tensors["embeddings.word_embeddings.weight"],
        "token_positions.weight": tensors["embeddings.position_embeddings.weight"],
        "kinds.weight": tensors["embeddings.token_type_embeddings.weight"],
    }
    found |= {f"norm.{part}": tensors[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias")}
    layers = {name.split(".")[2] for name in tensors if name.startswith("encoder.layer.")}
    renamed = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for number in sorted(layers, key=int):
        theirs, ours = f"encoder.layer.{number}", f"blocks.layers.{number}"
        for part in ("weight", "bias"):
            each = [tensors[f"{theirs}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            found[f"{ours}.self_attn.in_proj_{part}"] = torch.cat(each)
            found |= {f"{ours}.{mine}.{part}": tensors[f"{theirs}.{name}.{part}"] for mine, name in renamed.items()}
    return found
