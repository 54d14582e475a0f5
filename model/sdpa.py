"""The only caller of scaled_dot_product_attention, and the place to replace its kernel.

Which kernel runs is decided by torch, which asks the CUDA driver for it. ``with_kernel`` overrides that decision: where there is no driver (in tests on fake CUDA
tensors), or to compare kernels.

B batch, H heads, S states, K width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# On CUDA, torch's fallback would write all scores to memory. Limited to these kernels, it raises an error instead.
_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


class Kernel(Protocol):
    """Computes softmax attention; ``mask`` is bool, true where a query may see a key, and broadcasts to [B, H, S, S]."""

    def __call__(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Scores are scaled by 1/sqrt(K)."""
        ...


_chosen: list[Kernel] = []


def attention(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, mask: Tensor | None = None, is_causal: bool = False, fused: bool = False) -> Tensor:
    """Softmax attention by torch's best kernel, or by that of ``with_kernel``.

    Args:
        fused: on CUDA, raise an error rather than use a kernel that writes all scores to memory.
    """
    if _chosen:
        return _chosen[-1](q_BHSK, k_BHSK, v_BHSK, mask, is_causal)
    if fused and q_BHSK.is_cuda:
        with sdpa_kernel(_FUSED):
            return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=is_causal)
    return F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=is_causal)


@contextmanager
def with_kernel(kernel: Kernel) -> Iterator[None]:
    """Inside the block, every call of ``attention`` in this process uses this kernel."""
    _chosen.append(kernel)
    try:
        yield
    finally:
        _chosen.pop()
