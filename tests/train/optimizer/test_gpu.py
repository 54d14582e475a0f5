"""The fused kernel of AdamW on a GPU (``make gpu``); on the rehearsal's stand-in, the one that is compiled there. Not yet seen on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.gpu import DEVICE, NEEDS_GPU
from train.bench import plain_adamw
from train.optimizer.adamw import Hyper, update, update_pieces
from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610

pytestmark = NEEDS_GPU
HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, clip_variance=5.0, factor=0.25, count=3)


def tensors(n: int, seed: int, scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, g, m, v = (torch.randn(n, generator=generator) for _ in range(4))
    return [p, g * scale, m * scale / 8, v.square() * scale**2 / 16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fused_kernel_computes_the_same_on_a_gpu(packed: bool, dtype: torch.dtype) -> None:
    a = tensors(1_000_003, 7, 1.0)
    a[1] = a[1].to(dtype)
    if packed:
        a[2], a[3] = SIGNED_169.encode(a[2]), UNSIGNED_0610.encode(a[3])
    b: list[Any] = [t.to(DEVICE) for t in a]
    copy = torch.zeros(len(a[0]), dtype=dtype, device=DEVICE)
    plain_adamw.update(a[0], a[1], a[2], a[3], HYPER)
    update(b[0], b[1], b[2], b[3], HYPER, copy)
    assert torch.equal(copy, b[0].to(dtype))
    torch.testing.assert_close(b[0].cpu(), a[0], rtol=1e-5, atol=1e-6)
    for found, wanted, packing in zip(b[2:], a[2:], (SIGNED_169, UNSIGNED_0610), strict=True):
        if packed:
            # At most a step apart, and seldom, where rounding fell on the other side. A mean that all but cancels differs by the arithmetic's own error.
            is_far = (packing.decode(found.cpu()) - packing.decode(wanted)).abs() > 1e-6
            torch.testing.assert_close(packing.decode(found.cpu()), packing.decode(wanted), rtol=2**-8, atol=1e-6)
            assert float((is_far & (found.cpu() != wanted)).float().mean()) < 0.02, "another rounding would turn half of them"
        else:
            torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [(1 << 20, 64, 4096), (1_000_003, 1, 0, 70_001)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_gradient_in_pieces_gives_the_same_bits_as_a_whole_one(packed: bool, lengths: tuple[int, ...]) -> None:
    found = [t.to(DEVICE) for t in tensors(sum(lengths), 7, 1.0)]
    if packed:
        found[2], found[3] = SIGNED_169.encode(found[2]), UNSIGNED_0610.encode(found[3])
    a, b = found, [t.clone() for t in found]
    copies = [torch.zeros(sum(lengths), dtype=torch.float16, device=DEVICE) for _ in range(2)]
    pieces = [piece.clone() for piece in b[1].split(lengths)]
    for _ in range(2):  # the second update finds the table of the first
        update(a[0], a[1], a[2], a[3], HYPER, copies[0])
        update_pieces(b[0], pieces, b[2], b[3], HYPER, copies[1])
    assert all(torch.equal(x, y) for x, y in zip((a[0], a[2], a[3], copies[0]), (b[0], b[2], b[3], copies[1]), strict=True))
