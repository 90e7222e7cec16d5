"""Tokens into block order and the means of the blocks, in one pass over the tensors.

    out[b,h,slot] = x[b,h,order[b,h,slot]], zero from offsets[b,h,-1] on
    means[b,h,j]  = mean of the rows of block j, 0 for an empty one

x [B,H,L,D] of any strides with D contiguous; order [B,H,L], offsets [B,H,C+1] int32; out [B,H,L,D]
contiguous; means [B,H,C,D] of x's dtype, rounded once. One program per block (and one for the slots after the last),
rows in tiles of 64; float32 sums in a fixed order, no atomics: the same bits every time; NaN stays in its block.
The programs of all heads of a block run one after another: together they read whole tokens, as they lie in memory.
Bound by memory: one read and one write. Equals permute_torch.gather and permute_torch.block_means.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_kernel(
    x, y, order, offsets, x_out, y_out, x_means, y_means, H, L, C,
    x_stride_b, x_stride_h, x_stride_l, y_stride_b, y_stride_h, y_stride_l,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """PAIR: x and y, gathered and with their means; otherwise the means of x alone."""
    head, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (batch * H + head).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    wide = columns < HEAD_DIM
    x += batch.to(tl.int64) * x_stride_b + head.to(tl.int64) * x_stride_h
    if PAIR:
        y += batch.to(tl.int64) * y_stride_b + head.to(tl.int64) * y_stride_h
    first = tl.load(offsets + row * (C + 1) + block)
    if block == C:
        if PAIR:
            for at in range(first, L, ROWS):
                slots = at + tl.arange(0, ROWS)
                place = (row * L + slots)[:, None] * HEAD_DIM + columns[None, :]
                inside = (slots < L)[:, None] & wide[None, :]
                zeros = tl.zeros([ROWS, BLOCK_D], x_out.dtype.element_ty)
                tl.store(x_out + place, zeros, mask=inside)
                tl.store(y_out + place, zeros, mask=inside)
        return
    end = tl.load(offsets + row * (C + 1) + block + 1)
    x_total = tl.zeros([BLOCK_D], tl.float32)
    y_total = tl.zeros([BLOCK_D], tl.float32)
    for at in range(first, end, ROWS):
        slots = at + tl.arange(0, ROWS)
        inside = (slots < end)[:, None] & wide[None, :]
        token = tl.load(order + row * L + slots, mask=slots < end, other=0).to(tl.int64)
        x_tile = tl.load(x + token[:, None] * x_stride_l + columns[None, :], mask=inside, other=0.0)
        if PAIR:
            y_tile = tl.load(y + token[:, None] * y_stride_l + columns[None, :], mask=inside, other=0.0)
            place = (row * L + slots)[:, None] * HEAD_DIM + columns[None, :]
            tl.store(x_out + place, x_tile, mask=inside)
            tl.store(y_out + place, y_tile, mask=inside)
            y_total += tl.sum(y_tile.to(tl.float32), 0)
        x_total += tl.sum(x_tile.to(tl.float32), 0)
    size = tl.maximum(end - first, 1).to(tl.float32)
    place = (row * C + block) * HEAD_DIM + columns
    tl.store(x_means + place, (x_total / size).to(x_means.dtype.element_ty), mask=wide)
    if PAIR:
        tl.store(y_means + place, (y_total / size).to(y_means.dtype.element_ty), mask=wide)


def gather_with_means(
    key: Tensor, value: Tensor, order: Tensor, offsets: Tensor, masked: bool = True, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(key, value) in block order [B,H,L,D] contiguous, then their block means; masked and most make no difference."""
    out = key.new_empty(key.shape), value.new_empty(value.shape)
    of_keys, of_values = _launch((key, value), order, offsets, out)
    return (*out, of_keys, of_values)


def gathered_means(
    x: Tensor, order: Tensor, offsets: Tensor, dtype: torch.dtype | None = None, *, most: int | None = None
) -> Tensor:
    """The block means alone: x is read, and nothing of its size is written. dtype: x's unless given. most: of no
    importance here."""
    return _launch((x,), order, offsets, (), dtype)[0]


def _launch(
    inputs: tuple[Tensor, ...],
    order: Tensor,
    offsets: Tensor,
    out: tuple[Tensor, ...],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Means of one tensor, or of two of one shape that are gathered into out."""
    B, H, L, D = inputs[0].shape
    C = offsets.shape[-1] - 1
    inputs = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in inputs)
    means = tuple(x.new_empty((B, H, C, D), dtype=dtype) for x in inputs)
    pair, none = bool(out), (None, None)
    gather_kernel[(H, C + 1, B)](
        *(inputs if pair else (*inputs, None)), order.contiguous(), offsets.contiguous(),
        *(out if pair else none), *(means if pair else (*means, None)), H, L, C,
        *inputs[0].stride()[:3], *inputs[-1].stride()[:3], **meta(D, pair, inputs[0].element_size()),
    )  # fmt: skip
    return means


def meta(head_dim: int, pair: bool, item_size: int = 2) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options. item_size: bytes of a number."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    # A thread has 256 bytes of each tensor in flight: more warps, with less each, reach less of the memory's bandwidth.
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "ROWS": 64, "PAIR": pair,
        "num_warps": max(1, block_d * item_size // 128), "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
