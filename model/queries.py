"""What may come between the matrices of queries and keys and the attention: options of the block, off in the paper.

B batch, S states, H heads, K width of a head, R rows of any kind.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
"""As in the model's other norms."""


class HeadNorm(nn.Module):
    """Layer norm of each head's query or key with a learned gain and no bias (Dehghani et al. 2023, arXiv 2302.05442, section 2), so that scores cannot grow without
    bound while weights do. All heads of a layer share the gain. It is stored in fp32 and cast to the dtype of the input, whose statistics are fp32 inside the kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BSHK: Tensor) -> Tensor:
        return head_norm(x_BSHK, self.weight.to(x_BSHK.dtype))


def head_norm(x_RK: Tensor, gain_K: Tensor) -> Tensor:
    """Each row with mean 0 and variance 1, times the gain; rows may have any number of dimensions."""
    return F.layer_norm(x_RK, (len(gain_K),), gain_K, None, EPS)
