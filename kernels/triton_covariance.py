"""The covariance of keys and values of each block, in one pass over them.

    C_j = 1/n_j sum_{t in j} (k_t - kc_j) (v_t - vc_j)^T

One program a block (and a part of the columns, where [D,D] would not fit into registers), 64 keys at a time;
differences are rounded to the input's dtype, products summed in float32 in a fixed order. Bound by memory: it
writes D rows for every 64 keys that it reads. Equals covariance.covariances.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


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


def covariances(
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    heads: Tensor,
    columns: int,
) -> Tensor:
    """[B,heads,columns,D,D] of the key's dtype, 0 behind the last block; key and value contiguous."""
    B, H, L, D = key.shape
    Ck, options = offsets.shape[-1] - 1, meta(D, key.dtype)
    out = key.new_empty((B, len(heads), columns, D, D))
    parts = options["BLOCK_D"] // options["BLOCK_E"]
    covariance_kernel[(columns * parts, len(heads), B)](
        key, value, key_centroids.contiguous(), value_centroids.contiguous(), offsets.contiguous(), heads,
        out, H, L, Ck, len(heads), columns, **options,
    )  # fmt: skip
    return out


def meta(head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    full, block_d = dtype == torch.float32, max(16, triton.next_power_of_2(head_dim))
    block_e = min(block_d, 64 if full or block_d > 128 else 128)
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_E": block_e,
        "ROWS": 32 if full else 64, "LARGEST": torch.finfo(dtype).max,
        "PRECISION": "tf32x3" if full else "tf32", "num_warps": 8, "num_stages": 1, "enable_fp_fusion": True,
    }  # fmt: skip
