"""What may come between the matrices of queries and keys and the attention: options of the block, off in the paper.

B batch, S states (T text, then I image), H heads, K width of a head, R rows of any kind.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Attend
from model.config import StreamShape, TransformerConfig
from model.offsets import Kind

EPS = 1e-5
"""As in the model's other norms."""


class HeadNorm(nn.Module):
    """Layer norm of each head's query or key with a learned gain and no bias (Dehghani et al. 2023, arXiv 2302.05442, section 2), so that scores cannot grow without
    bound while weights do. All heads of a layer share the gain. It is stored in fp32 and cast to the dtype of the input, whose statistics are fp32 inside the kernel."""

    def __init__(self, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), gain))

    def forward(self, x_BSHK: Tensor) -> Tensor:
        return head_norm(x_BSHK, self.weight.to(x_BSHK.dtype))


def head_norm(x_RK: Tensor, gain_K: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1, times the gain; rows may have any number of dimensions."""
    return F.layer_norm(x_RK, (len(gain_K),), gain_K, None, EPS)


_BASE = 100.0
"""Wavelengths run from 2 pi to nearly 2 pi times this many places (Heo et al. 2024: less than the usual 10,000, as grids are small)."""


def turn_table(cfg: TransformerConfig, shape: StreamShape) -> Tensor:
    """Cosines and sines of the angles by which pairs of neighbouring elements of queries and of keys turn at each state, fp32 [query or key, S, K/2, cosine or sine].

    Half of a head turns with the row and half with the column (Heo et al. 2024, arXiv 2403.13298). In the text both are the number of the slot, so that it turns as
    in one dimension (Su et al. 2021, arXiv 2104.09864), and the picture begins after it, as in Wang et al. 2024, arXiv 2409.12191. A query stands at the place of
    what its state predicts and a key at that of what its state holds, so that the angle between them is the way from one code to the other also across the ends
    of rows. Start vectors stand before the first place.
    """
    text, grid = shape.text_tokens, shape.grid
    slot_T, image_I = torch.arange(text), torch.arange(shape.image_tokens)
    row_I, column_I = image_I // grid, image_I % grid
    image_I2 = text + torch.stack([row_I, column_I], dim=1)
    start_12 = torch.tensor([[text, text - 1]])
    query_S2 = torch.cat([slot_T[:, None].expand(-1, 2), image_I2])
    key_S2 = torch.cat([slot_T[:, None].expand(-1, 2) - 1, start_12, image_I2[:-1]])
    size = cfg.width // cfg.heads // 4
    rate_K = _BASE ** -(torch.arange(size, dtype=torch.float64) / size)
    angle_2SK = (torch.stack([query_S2, key_S2])[..., None] * rate_K).flatten(2)
    return torch.stack([angle_2SK.cos(), angle_2SK.sin()], dim=3).float()


def turned(x_RK: Tensor, turn_RK: Tensor) -> Tensor:
    """Rows whose pairs have been multiplied, as complex numbers, by those of ``turn_table``: complex [R, K/2]. Products are fp32, the result has the rows' dtype.
    Complex products, because they are a twentieth of the time on a CPU that pairs of slices take."""
    pairs_RK2 = x_RK.to(torch.promote_types(x_RK.dtype, torch.float32)).unflatten(-1, (-1, 2))
    if pairs_RK2.stride(-1) != 1:  # a gradient that was expanded
        pairs_RK2 = pairs_RK2.contiguous()
    return torch.view_as_real(torch.view_as_complex(pairs_RK2) * turn_RK).flatten(-2).to(x_RK.dtype)


class _Turn(torch.autograd.Function):
    """Written by hand, because it keeps no activation for the backward pass, which turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x_BHSK: Tensor, turn_SK: Tensor) -> Tensor:
        ctx.save_for_backward(turn_SK)
        return turned(x_BHSK, turn_SK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (turn_SK,) = ctx.saved_tensors
        return turned(grads[0], turn_SK.conj()), None


def turn(x_BHSK: Tensor, turn_SK: Tensor) -> Tensor:
    """``turned``, of all states, with a gradient."""
    return _Turn.apply(x_BHSK, turn_SK)


class RotaryAttention(nn.Module):
    """An attention engine that is given queries and keys turned by their places (``turn_table``)."""

    def __init__(self, cfg: TransformerConfig, shape: StreamShape, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.turns: Tensor
        self.register_buffer("turns", turn_table(cfg, shape), persistent=False)

    def forward(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        q_SK, k_SK = torch.view_as_complex(self.turns)
        return self.attend(turn(q_BHSK, q_SK), turn(k_BHSK, k_SK), v_BHSK, kind)
