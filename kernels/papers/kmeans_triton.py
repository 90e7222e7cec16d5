"""The two steps of one iteration of k-means (kernels/papers/kmeans_torch.py), straight from the tokens.

Formulas and arguments as there. x [G,N,D] of any strides with D contiguous.

assign: one program takes BLOCK_M tokens of a head and all centroids, in tiles; distances stay on the chip.
    For bfloat16 and float16 a centroid is the sum of two numbers of that dtype, its rounding and what is
    left, so that two products on tensor cores are nearly as exact as float32; float32 takes three TF32
    products. Labels are those of kmeans_torch, except for ties within that rounding.
means: kernels/blocks/permute_triton.py's, float32 sums of sorted runs in a fixed order.

No atomics, nothing is read back: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..blocks import permute_triton
from ..triton_configs import Config, assign_config_for
from ..triton_tiles import capability, descriptor, load_rows


def bytes_per_token(head_dim: int, clusters: int) -> int:
    """Working memory: labels and what sorting them takes."""
    return 48


@triton.jit
def assign_kernel(
    x, valid, high, low, half, labels, N, C, stride_g, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """high, low [G,C,HEAD_DIM] of x's dtype: centroids are their sum, or high alone. half: |m_c|^2 / 2."""
    head = tl.program_id(1)
    head64 = head.to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    inside = (token < N)[:, None] & (columns < HEAD_DIM)[None, :]
    where = x + head64 * stride_g + token.to(tl.int64)[:, None] * stride_n + columns[None, :]
    rows = tl.load(where, mask=inside, other=0.0)
    within = tl.arange(0, BLOCK_C)
    # For each place in a tile the smallest distance so far, and the first tile that has it; one reduction at the end.
    least = tl.full([BLOCK_M, BLOCK_C], float("inf"), tl.float32)
    nearest = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for at in range(0, C, BLOCK_C):
        norm = tl.load(half + head64 * C + at + within, mask=at + within < C, other=float("inf"))
        tile = load_rows(high, head, at, C, BLOCK_C, HEAD_DIM, BLOCK_D, TMA)
        along = tl.dot(rows, tile.T, input_precision=PRECISION)
        if low is not None:
            rest = load_rows(low, head, at, C, BLOCK_C, HEAD_DIM, BLOCK_D, TMA)
            along = tl.dot(rows, rest.T, along)
        distance = norm[None, :] - along
        nearer = distance < least
        least = tl.where(nearer, distance, least)
        nearest = tl.where(nearer, at, nearest)
    index = nearest + within[None, :]
    label = tl.min(tl.where(least == tl.min(least, 1)[:, None], index, C), 1)
    if valid is not None:
        label = tl.where(tl.load(valid + token, mask=token < N, other=0) != 0, label, C)
    tl.store(labels + head64 * N + token, label.to(labels.dtype.element_ty), mask=token < N)


def assign(x: Tensor, valid: Tensor | None, centroids: Tensor, config: Config | None = None) -> Tensor:
    """[G,N]; int16 if that holds C."""
    (G, N, D), C = x.shape, centroids.shape[1]
    x, centroids = x if x.stride(-1) == 1 else x.contiguous(), centroids.contiguous()
    half = centroids.square().sum(-1) / 2
    high: Any = centroids.to(x.dtype)
    low: Any = None
    if x.dtype != torch.float32:
        low = (centroids - high).to(x.dtype)
    labels = torch.empty((G, N), dtype=torch.int16 if C < 2**15 else torch.int32, device=x.device)
    c = config or assign_config_for(capability(x.device), D, x.dtype)
    options = meta(c, D)
    if c.tma:
        high, low = (
            None if y is None else descriptor(y[None], c.block_c, options["BLOCK_D"]) for y in (high, low)
        )
    assign_kernel[(triton.cdiv(N, c.block_m), G)](
        x, valid, high, low, half, labels, N, C, *x.stride()[:2], **options
    )
    return labels


def means(x: Tensor, order: Tensor, offsets: Tensor, before: Tensor) -> Tensor:
    """[G,C,D] float32."""
    found = permute_triton.gathered_means(x[None], order[None], offsets[None], torch.float32)[0]
    return torch.where((offsets.diff(dim=-1) > 0)[..., None], found, before)


def meta(c: Config, head_dim: int) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_M": c.block_m,
        "BLOCK_C": c.block_c, "TMA": c.tma, "PRECISION": "tf32x3", "num_warps": c.num_warps,
        "num_stages": c.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
