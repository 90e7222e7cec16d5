"""The covariance of keys and values of each block, in one pass over them.

    C_j = 1/n_j sum_{t in j} (k_t - kc_j) (v_t - vc_j)^T

One program per block (and per part of the columns, where [D,D] would not fit into registers), 64 keys at a time;
differences are rounded to the input's dtype, products summed in float32 in a fixed order. Bound by memory: it writes
D rows for every 64 keys that it reads. Equals covariance_torch.covariances.

The weights of the blocks are a softmax over few columns: a program takes ROWS rows of a head, and computes their
logits twice, the first time for their sums, and adds up those of a group. Equals covariance_torch.weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import term_blocks


@triton.jit
def covariance_kernel(
    key, value, key_centroids, value_centroids, offsets, heads, out, H, L, Ck, n, columns,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    LARGEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """LARGEST: finite number of the dtype."""
    PARTS: tl.constexpr = BLOCK_D // BLOCK_E
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    place, batch = tl.program_id(1), tl.program_id(2)
    row = batch * H + tl.load(heads + place).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    wide, wide_e = d < HEAD_DIM, e < HEAD_DIM
    acc = tl.zeros([BLOCK_D, BLOCK_E], tl.float32)
    if block < Ck:
        first = tl.load(offsets + row * (Ck + 1) + block)
        end = tl.load(offsets + row * (Ck + 1) + block + 1)
        centroid = (row * Ck + block) * HEAD_DIM
        key_centroid = tl.load(key_centroids + centroid + d, mask=wide, other=0.0).to(tl.float32)
        value_centroid = tl.load(value_centroids + centroid + e, mask=wide_e, other=0.0).to(tl.float32)
        for at in range(first, end, ROWS):
            slots = at + tl.arange(0, ROWS)
            rows = (row * L + slots)[:, None] * HEAD_DIM
            inside = (slots < end)[:, None]
            k = tl.load(key + rows + d[None, :], mask=inside & wide[None, :], other=0.0)
            v = tl.load(value + rows + e[None, :], mask=inside & wide_e[None, :], other=0.0)
            dk = tl.where(inside, k.to(tl.float32) - key_centroid[None, :], 0.0).to(k.dtype)
            dv = tl.where(inside, v.to(tl.float32) - value_centroid[None, :], 0.0).to(v.dtype)
            acc = tl.dot(dk.T, dv, acc, input_precision=PRECISION)
        acc /= tl.maximum(end - first, 1).to(tl.float32)
    acc = tl.where(tl.abs(acc) <= LARGEST, acc, 0.0)  # nor NaN
    start = out + ((batch.to(tl.int64) * n + place) * columns + block) * HEAD_DIM * HEAD_DIM
    tl.store(
        start + d[:, None] * HEAD_DIM + e[None, :], acc.to(out.dtype.element_ty),
        mask=wide[:, None] & wide_e[None, :],
    )  # fmt: skip


@triton.jit
def weights_kernel(
    query_centroids, key_centroids, bias, heads, out, scale, H, Cq, Ck, n, columns,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place, batch = tl.program_id(1), tl.program_id(2)
    row = batch * H + tl.load(heads + place).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)
    is_row, wide = (i < Cq)[:, None], d < HEAD_DIM
    q = tl.load(
        query_centroids + (row * Cq + i[:, None]) * HEAD_DIM + d[None, :],
        mask=is_row & wide[None, :],
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    base = tl.zeros([ROWS], tl.float32)
    for at in range(0, Ck, COLUMNS):
        s = _logits(q, key_centroids, bias, row, i, at, d, scale, Cq, Ck, HEAD_DIM, COLUMNS, PRECISION)
        before = base
        top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        before = tl.where(total == 0, 0.0, total * tl.exp(before - base))  # 0 x infinity
        total = before + tl.sum(tl.exp(s - base[:, None]), 1)
    counts = total > 0  # False where nothing is skipped, and where it is no number
    GROUPS: tl.constexpr = ROWS // GROUP
    skips = tl.sum(tl.reshape(counts.to(tl.float32), [GROUPS, GROUP]), 1)
    share = scale / tl.maximum(skips, 1.0)[:, None]
    inverse = tl.where(counts, 1 / total, 0.0)
    groups = tl.cdiv(Cq, GROUP)
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    start = out + ((batch.to(tl.int64) * n + place) * groups + g[:, None]) * columns
    for at in range(0, columns, COLUMNS):
        s = _logits(q, key_centroids, bias, row, i, at, d, scale, Cq, Ck, HEAD_DIM, COLUMNS, PRECISION)
        w = tl.exp(s - base[:, None]) * inverse[:, None]
        w = tl.where(w == w, w, 0.0)
        w = tl.sum(tl.reshape(w, [GROUPS, GROUP, COLUMNS]), 1) * share
        j = at + tl.arange(0, COLUMNS)
        inside = (g < groups)[:, None] & (j < columns)[None, :]
        tl.store(start + j[None, :], w.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _logits(
    q, key_centroids, bias, row, i, at, d, scale, Cq, Ck,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of COLUMNS key blocks from `at` on; -inf after the last."""
    j = at + tl.arange(0, COLUMNS)
    k = tl.load(
        key_centroids + (row * Ck + j[:, None]) * HEAD_DIM + d[None, :],
        mask=(j < Ck)[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
    )  # fmt: skip
    b = tl.load(
        bias + (row * Cq + i[:, None]) * Ck + j[None, :],
        mask=(i < Cq)[:, None] & (j < Ck)[None, :], other=float("-inf"),
    )  # fmt: skip
    return scale * tl.dot(q, k.T, input_precision=PRECISION) + b


def covariances(
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    heads: Tensor,
    columns: int,
) -> Tensor:
    """[B,heads,columns,D,D] of the key's dtype, 0 after the last block; key and value contiguous."""
    B, H, L, D = key.shape
    Ck, options = offsets.shape[-1] - 1, meta(D, key.dtype)
    out = key.new_empty((B, len(heads), columns, D, D))
    parts = options["BLOCK_D"] // options["BLOCK_E"]
    covariance_kernel[(columns * parts, len(heads), B)](
        key, value, key_centroids.contiguous(), value_centroids.contiguous(), offsets.contiguous(), heads,
        out, H, L, Ck, len(heads), columns, **options,
    )  # fmt: skip
    return out


def weights(
    queries: Tensor, bias: Tensor, key_centroids: Tensor, heads: Tensor, scale: float, columns: int
) -> Tensor:
    """[B,heads,groups,columns] of the keys' dtype."""
    B, H, m, D = queries.shape
    group = term_blocks(m)
    out = key_centroids.new_empty((B, len(heads), triton.cdiv(m, group), columns))
    options = weights_meta(D, key_centroids.dtype, group)
    weights_kernel[(triton.cdiv(m, options["ROWS"]), len(heads), B)](
        queries.contiguous(), key_centroids.contiguous(), bias.contiguous(), heads, out, scale, H, m,
        bias.shape[-1], len(heads), columns, **options,
    )  # fmt: skip
    return out


def weights_meta(head_dim: int, dtype: torch.dtype, group: int = 1) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options. float32 logits are exact."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "ROWS": max(32, group), "COLUMNS": 64, "GROUP": group,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32", "num_warps": 4, "num_stages": 2,
        "enable_fp_fusion": True,
    }  # fmt: skip


def meta(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    full, block_d = dtype == torch.float32, max(16, triton.next_power_of_2(head_dim))
    block_e = min(block_d, 64 if full or block_d > 128 else 128)
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_E": block_e,
        "ROWS": 32 if full else 64, "LARGEST": torch.finfo(dtype).max,
        "PRECISION": "tf32x3" if full else "tf32", "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
