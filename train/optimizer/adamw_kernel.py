"""One pass of AdamW on a GPU: gradient, master weight and moments are each read once, and written once, with the 16-bit copy of the weight. Triton; not yet seen on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610, Format

_BLOCK = 1024
OPTIONS = {"enable_fp_fusion": True}
"""Products are fused with sums, as in torch's operations on a CPU. Set explicitly, because Triton's default depends on its version."""


@triton.jit
def _decode(code, significand: tl.constexpr, signed: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = code.to(tl.int32) & 0xFFFF
    if signed:
        magnitude = bits & 0x7FFF
    else:
        magnitude = bits
    value = tl.where(magnitude == 0, 0, (magnitude + (67 << significand)) << (23 - significand))
    if signed:
        value = value | ((bits & 0x8000) << 16)
    return value.to(tl.float32, bitcast=True)


@triton.jit
def _encode(x, significand: tl.constexpr, signed: tl.constexpr, largest: tl.constexpr, smallest: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.where(x != x, largest, x)
    x = tl.minimum(x, largest)
    if signed:
        x = tl.maximum(x, -largest)
    else:
        x = tl.maximum(x, 0.0)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = ((magnitude + (1 << (22 - significand))) >> (23 - significand)) - (67 << significand)
    code = tl.where(tl.abs(x) < smallest, 0, code)
    if signed:
        code = code | ((bits >> 16) & 0x8000)
    return code.to(tl.int16)


@triton.jit
def _pass(  # type: ignore[no-untyped-def]
    g, at, inside, p_ptr, mean_ptr, variance_ptr, copy_ptr, factor, decay, step, inverse_correction, beta1, beta2, eps, clip,
    m_largest: tl.constexpr, m_smallest: tl.constexpr, v_largest: tl.constexpr, v_smallest: tl.constexpr,
    packed: tl.constexpr, copies: tl.constexpr,
):  # fmt: skip
    """The update of the elements ``at``, whose gradients are g."""
    g = g.to(tl.float32) * factor
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    m = tl.load(mean_ptr + at, mask=inside, other=0)
    v = tl.load(variance_ptr + at, mask=inside, other=0)
    if packed:
        m = _decode(m, 9, True)
        v = _decode(v, 10, False)
    m = m + (g - m) * (1.0 - beta1)
    v = v * beta2 + g * g * (1.0 - beta2)
    v = tl.where(v > clip, clip, v)  # tl.minimum would turn NaN into the limit
    p = p * decay - step * m / (tl.sqrt(v) * inverse_correction + eps)
    tl.store(p_ptr + at, p, mask=inside)
    if copies:
        tl.store(copy_ptr + at, p.to(copy_ptr.dtype.element_ty), mask=inside)
    if packed:
        tl.store(mean_ptr + at, _encode(m, 9, True, m_largest, m_smallest), mask=inside)
        tl.store(variance_ptr + at, _encode(v, 10, False, v_largest, v_smallest), mask=inside)
    else:
        tl.store(mean_ptr + at, m, mask=inside)
        tl.store(variance_ptr + at, v, mask=inside)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    p_ptr, grad_ptr, mean_ptr, variance_ptr, copy_ptr, n, factor, decay, step, inverse_correction, beta1, beta2, eps, clip,
    m_largest: tl.constexpr, m_smallest: tl.constexpr, v_largest: tl.constexpr, v_smallest: tl.constexpr,
    packed: tl.constexpr, copies: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program for each block of one gradient."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < n
    g = tl.load(grad_ptr + at, mask=inside, other=0.0)
    _pass(
        g, at, inside, p_ptr, mean_ptr, variance_ptr, copy_ptr, factor, decay, step, inverse_correction, beta1, beta2, eps, clip,
        m_largest, m_smallest, v_largest, v_smallest, packed, copies,
    )  # fmt: skip


@triton.jit
def _pieces_kernel(  # type: ignore[no-untyped-def]
    p_ptr, grad_ptr, mean_ptr, variance_ptr, copy_ptr, table_ptr, owner_ptr, factor, decay, step, inverse_correction, beta1, beta2, eps, clip,
    m_largest: tl.constexpr, m_smallest: tl.constexpr, v_largest: tl.constexpr, v_smallest: tl.constexpr,
    packed: tl.constexpr, copies: tl.constexpr, aligned: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program for each block of each gradient. ``grad_ptr`` tells the dtype alone; addresses are in the table (see ``_Table``)."""
    row = table_ptr + tl.load(owner_ptr + tl.program_id(0)).to(tl.int64) * 4
    address, start, length, first = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    piece_ptr = address.to(grad_ptr.dtype)
    if aligned:  # lets the compiler read and write several elements at once
        piece_ptr = tl.multiple_of(piece_ptr, 16)
        start = tl.multiple_of(start, 16)
    within = (tl.program_id(0) - first) * block + tl.arange(0, block)
    inside = within < length
    g = tl.load(piece_ptr + within, mask=inside, other=0.0)
    _pass(
        g, start + within, inside, p_ptr, mean_ptr, variance_ptr, copy_ptr, factor, decay, step, inverse_correction, beta1, beta2, eps, clip,
        m_largest, m_smallest, v_largest, v_smallest, packed, copies,
    )  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """Where the gradients of a flat tensor are, on its device."""

    key: tuple[tuple[int, int], ...]
    """Address and length of each gradient."""
    rows: Tensor
    """Int64 [gradients, 4]: address, first element in the flat tensor, length, first program."""
    owners: Tensor
    """Int32 [programs]: the row of each program."""
    aligned: bool
    """Whether all addresses, in bytes, and all first elements are multiples of 16."""


_tables: dict[int, _Table] = {}
"""The latest table of each flat tensor, by its address: gradients mostly stay where they are, and then nothing is sent to the GPU."""


def _table(p: Tensor, grads: Sequence[Tensor]) -> _Table:
    key = tuple((grad.data_ptr(), grad.numel()) for grad in grads)
    known = _tables.get(p.data_ptr())
    if known is not None and known.key == key:
        return known
    rows, start, program = [], 0, 0
    for address, length in key:
        rows.append((address, start, length, program))
        start, program = start + length, program + triton.cdiv(length, _BLOCK)
    host = torch.tensor(rows, dtype=torch.int64)
    table = (host.pin_memory() if p.is_cuda else host).to(p.device, non_blocking=True)
    counts = (table[:, 2] + _BLOCK - 1) // _BLOCK
    # With the size given, nothing waits for the GPU.
    owners = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32, device=p.device), counts, output_size=program)
    aligned = all(address % 16 == 0 and start % 16 == 0 for address, start, _, _ in rows)
    _tables[p.data_ptr()] = found = _Table(key, table, owners, aligned)
    return found


def update(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Any, copy: Tensor | None = None) -> None:
    """``train.optimizer.adamw.update`` for tensors on a GPU. Does not wait for the GPU. ``hyper`` is a ``train.optimizer.adamw.Hyper``."""
    if n := p.numel():
        _kernel[(triton.cdiv(n, _BLOCK),)](
            p, grad, mean, variance, p if copy is None else copy, n, *_numbers(hyper), packed=mean.dtype == torch.int16, copies=copy is not None, block=_BLOCK, **OPTIONS
        )  # fmt: skip


def update_pieces(p: Tensor, grads: Sequence[Tensor], mean: Tensor, variance: Tensor, hyper: Any, copy: Tensor | None = None) -> None:
    """``train.optimizer.adamw.update_pieces`` for tensors on a GPU: one launch for all gradients, which must be of one dtype. Does not wait for the GPU."""
    if not p.numel():
        return
    table = _table(p, grads)
    _pieces_kernel[(len(table.owners),)](
        p, grads[0], mean, variance, p if copy is None else copy, table.rows, table.owners, *_numbers(hyper),
        packed=mean.dtype == torch.int16, copies=copy is not None, aligned=table.aligned, block=_BLOCK, **OPTIONS,
    )  # fmt: skip


def _numbers(hyper: Any) -> tuple[float, ...]:
    """What the kernels take between tensors and flags."""
    step, inverse = hyper.lr / hyper.correction1, hyper.correction2**-0.5
    numbers = (hyper.factor, 1 - hyper.lr * hyper.weight_decay, step, inverse, hyper.beta1, hyper.beta2, hyper.eps, hyper.clip_variance)
    return (*numbers, *_limits(SIGNED_169), *_limits(UNSIGNED_0610))


def _limits(fmt: Format) -> tuple[float, float]:
    return fmt.largest, fmt.smallest
