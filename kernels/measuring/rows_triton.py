"""What a plan gives a few queries of each head, in one pass over its keys. Equals rows_torch.planned_rows.

One program takes ROWS queries of a head, each of a block of its own, so it walks over all key blocks, in
tiles of KEYS keys that end where their block ends, and then over all centroids: one online softmax, in units
of log 2. A query's logits are -inf in blocks that it does not keep. Keys after the last block are not read.
Accumulators and results float32; a fixed order of sums; nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import SparsePlan
from ..triton_tiles import LOG2_E, capability
from .rows_torch import kept_of


@triton.jit
def _step(s, v, top, total, acc, PRECISION: tl.constexpr):
    """Adds a tile to the online softmax. Also returns the factor of earlier sums, and the sum of the tile."""
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing seen yet: exp2(-inf - -inf) is NaN
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    here = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total * shrink + here, acc, shrink, here


@triton.jit
def rows_kernel(
    query, blocks, kept, key, value, key_centroids, value_centroids, key_offsets, steps, bias, out, share,
    scale, H, L, Cq, Ck, n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    CENTROIDS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """kept [B,H,Ck,n]: a key block's flags lie together. steps [B,H]: tiles of keys."""
    head = tl.program_id(2) * H + tl.program_id(1)
    head64 = head.to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = i < n
    columns = tl.arange(0, BLOCK_D)
    wide = (columns < HEAD_DIM)[None, :]
    where = (head64 * n + i)[:, None] * HEAD_DIM + columns[None, :]
    q = tl.load(query + where, mask=live[:, None] & wide, other=0.0)
    scale = scale * LOG2_E
    t = tl.arange(0, KEYS)
    tile = t[:, None] * HEAD_DIM + columns[None, :]

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    offsets = key_offsets + head64 * (Ck + 1)
    flags = kept + head64 * Ck * n + i
    # Offsets and flags are loaded one step before they are used: nothing waits for them.
    block = 0
    low, high = tl.load(offsets), tl.load(offsets + 1)
    next_high = tl.load(offsets + tl.minimum(2, Ck))
    flag = tl.load(flags, mask=live, other=False)
    for _ in tl.range(0, tl.load(steps + head), num_stages=STAGES):
        stop = tl.minimum(low + KEYS, high)
        inside = t < stop - low
        start = (head64 * L + low) * HEAD_DIM
        k = tl.load(key + start + tile, mask=inside[:, None] & wide, other=0.0)
        v = tl.load(value + start + tile, mask=inside[:, None] & wide, other=0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale
        s = tl.where(flag[:, None] & inside[None, :], s, float("-inf"))
        top, total, acc, _, _ = _step(s, v, top, total, acc, PRECISION)
        finished = stop >= high
        block = tl.where(finished, block + 1, block)
        low = stop  # blocks follow each other
        high = tl.where(finished, next_high, high)
        next_high = tl.load(offsets + tl.minimum(block + 2, Ck))
        flag = tl.load(flags + tl.minimum(block, Ck - 1).to(tl.int64) * n, mask=live, other=False)

    c = tl.arange(0, CENTROIDS)
    tile = c[:, None] * HEAD_DIM + columns[None, :]
    mass = tl.zeros([ROWS], tl.float32)
    block_of_row = tl.load(blocks + head64 * n + i, mask=live, other=0)
    biases = bias + ((head64 * Cq + block_of_row) * Ck)[:, None]
    for at in tl.range(0, Ck, CENTROIDS, num_stages=1):
        inside = c < Ck - at
        start = (head64 * Ck + at) * HEAD_DIM
        k = tl.load(key_centroids + start + tile, mask=inside[:, None] & wide, other=0.0)
        v = tl.load(value_centroids + start + tile, mask=inside[:, None] & wide, other=0.0)
        counted = live[:, None] & inside[None, :]
        b = tl.load(biases + (at + c)[None, :], mask=counted, other=float("-inf"))
        s = tl.dot(q, k.T, input_precision=PRECISION) * scale + b * LOG2_E
        s = tl.where(b == float("-inf"), float("-inf"), s)
        top, total, acc, shrink, here = _step(s, v, top, total, acc, PRECISION)
        mass = mass * shrink + here

    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + where, acc / total[:, None], mask=live[:, None] & wide)
    tl.store(share + head64 * n + i, mass / total, mask=live)


def planned_rows(query: Tensor, blocks: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B,H,n,D], share [B,H,n]), float32; the tensors of the plan are contiguous."""
    B, H, n, D = query.shape
    L, (Cq, Ck) = plan.key.shape[2], plan.bias.shape[-2:]
    options = meta(capability(query.device), D, plan.key.dtype)
    sizes, keys = plan.key_offsets.diff(dim=-1), options["KEYS"]
    # An empty block takes a step too: the walk goes from block to block.
    steps = (sizes + (keys - 1)).div(keys, rounding_mode="floor").clamp_(min=1).sum(-1, dtype=torch.int32)
    out = query.new_empty((B, H, n, D), dtype=torch.float32)
    share = query.new_empty((B, H, n), dtype=torch.float32)
    rows_kernel[(triton.cdiv(n, options["ROWS"]), H, B)](
        query.to(plan.key.dtype).contiguous(), blocks.contiguous(), kept_of(blocks, plan).mT.contiguous(),
        plan.key, plan.value, plan.key_centroids, plan.value_centroids, plan.key_offsets, steps, plan.bias,
        out, share, float(scale), H, L, Cq, Ck, n, **options,
    )  # fmt: skip
    return out, share


def meta(capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    full, large = dtype == torch.float32, head_dim > 128
    # Four warps leave room for two programs a multiprocessor, but without wgmma too few registers.
    few = head_dim <= 64 or (not large and capability[0] in (9, 10))
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": 32 if full else 64, "KEYS": 32 if full or large else 64, "CENTROIDS": 32,
        "PRECISION": "tf32x3" if full else "tf32", "STAGES": 1 if full and large else 2,
        "num_warps": 4 if few else 8, "num_stages": 2, "enable_fp_fusion": True,
    }  # fmt: skip
