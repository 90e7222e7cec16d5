"""Tokens into block order and the means of the blocks, in one pass over the tensor.

    out[b,h,slot] = x[b,h,order[b,h,slot]], zero from offsets[b,h,-1] on
    means[b,h,j]  = mean of the rows of block j, 0 for an empty one

x [B,H,L,D] of any strides with D contiguous; order [B,H,L], offsets [B,H,C+1] int32; out [B,H,L,D] contiguous
and of x's dtype; means [B,H,C,D] float32. One program a block (and one for the slots behind the last), rows
in tiles of 64; float32 sums in a fixed order, no atomics: the same bits every time; NaN stays in its block.
Bound by memory: one read and one write of x. Equals permute.gather and permute.block_means.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_kernel(
    x, order, offsets, out, means, H, L, C, stride_b, stride_h, stride_l,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (batch * H + head).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    wide = columns < HEAD_DIM
    base = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    first = tl.load(offsets + row * (C + 1) + block)
    if block == C:
        if STORE:
            for at in range(first, L, ROWS):
                slots = at + tl.arange(0, ROWS)
                where = out + (row * L + slots)[:, None] * HEAD_DIM + columns[None, :]
                zeros = tl.zeros([ROWS, BLOCK_D], out.dtype.element_ty)
                tl.store(where, zeros, mask=(slots < L)[:, None] & wide[None, :])
        return
    end = tl.load(offsets + row * (C + 1) + block + 1)
    total = tl.zeros([BLOCK_D], tl.float32)
    for at in range(first, end, ROWS):
        slots = at + tl.arange(0, ROWS)
        inside = (slots < end)[:, None] & wide[None, :]
        token = tl.load(order + row * L + slots, mask=slots < end, other=0).to(tl.int64)
        tile = tl.load(base + token[:, None] * stride_l + columns[None, :], mask=inside, other=0.0)
        if STORE:
            tl.store(out + (row * L + slots)[:, None] * HEAD_DIM + columns[None, :], tile, mask=inside)
        total += tl.sum(tile.to(tl.float32), 0)
    mean = total / tl.maximum(end - first, 1).to(tl.float32)
    tl.store(means + (row * C + block) * HEAD_DIM + columns, mean, mask=wide)


def gather_with_means(
    x: Tensor, order: Tensor, offsets: Tensor, masked: bool = True
) -> tuple[Tensor, Tensor]:
    """(x in block order [B,H,L,D] contiguous, block means [B,H,C,D] float32); masked makes no difference."""
    out = x.new_empty(x.shape)
    return out, _launch(x, order, offsets, out)


def gathered_means(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """The block means alone [B,H,C,D] float32: x is read, and nothing of its size is written."""
    return _launch(x, order, offsets, None)


def _launch(x: Tensor, order: Tensor, offsets: Tensor, out: Tensor | None) -> Tensor:
    B, H, L, D = x.shape
    C = offsets.shape[-1] - 1
    if x.stride(-1) != 1:
        x = x.contiguous()
    means = torch.empty(B, H, C, D, dtype=torch.float32, device=x.device)
    gather_kernel[(C + 1, H, B)](
        x, order.contiguous(), offsets.contiguous(), means if out is None else out, means, H, L, C,
        *x.stride()[:3], **meta(D, out is not None),
    )  # fmt: skip
    return means


def meta(head_dim: int, store: bool) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "ROWS": 64,
        "STORE": store, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
