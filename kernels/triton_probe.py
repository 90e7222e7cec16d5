"""Query centroids against all true keys (kernels/probe.py), without a [Cq, L] matrix in memory.

Formulas as in probe.py. For query centroid i and key block j, s_t = scale qc_i.k_t, w_t = exp(s_t - m_ij):

    lse_ij   = m_ij + log sum_t w_t
    error_ij = 2 (m_ij - c_i) + log lost_ij - log n_j
    "output_error": lost_ij = |sum_t w_t v_t - (sum_t w_t) vc_j|^2,            c_i = log sum_j exp(lse_ij)
    "svg_ear":      lost_ij = sum_t |w_t v_t - exp(sbar_ij - m_ij) vc_j|^2,    c_i = max_j m_ij

One program takes BLOCK_M query centroids and a run of key blocks; logits and weights stay on the chip. In low
precision the weights are rounded before the second product, and the same rounded weights are summed for vc_j,
so the difference cancels to float32's accuracy. Query and key centroids are rounded to the dtype of the keys,
as the attention kernel will see them: the gap makes up for what that does to a centroid's logit.

key, value [B,H,L,D] contiguous in block order; blocks of any size, in tiles of 64 keys (windows that end with
the block's part, as in triton_attention.py): one pass where no block is larger (ONE_TILE), else two.
Accumulators and results float32. Deterministic, nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import KEY_BLOCK
from .probe import Scores
from .triton_configs import Config, probe_config_for
from .triton_tiles import LN_2, LOG2_E, capability, descriptor, load_rows

BLOCK_N = KEY_BLOCK
BLOCKS_PER_PROGRAM = 64


@triton.jit
def _logits(q, key, head, low, stop, length, scale, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
            BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Logits over log 2 of the slots [low, stop), the last of the window; -inf for its other slots."""
    k = load_rows(key, head, stop - BLOCK_N, length, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale
    return tl.where((tl.arange(0, BLOCK_N) >= BLOCK_N - (stop - low))[None, :], s, float("-inf"))


@triton.jit
def probe_kernel(
    query_centroids, key, value, key_offsets, value_centroids, center, lse, error, tops, scale, L, Cq, Ck,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, ONE_TILE: tl.constexpr, OUTPUT_ERROR: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The module's docstring. error: 2 m_ij + log lost_ij; tops: m_ij, written for "svg_ear" only."""
    head = tl.program_id(2)
    head64 = head.to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    wide = columns < HEAD_DIM
    live = i < Cq
    q = tl.load(
        query_centroids + (head64 * Cq + i)[:, None] * HEAD_DIM + columns[None, :],
        mask=live[:, None] & wide[None, :], other=0.0,
    )  # fmt: skip
    scale = scale * LOG2_E
    offsets = key_offsets + head64 * (Ck + 1)
    begin = tl.program_id(1) * BLOCKS
    first, end = tl.load(offsets + begin), tl.load(offsets + begin + 1)
    for j in range(begin, tl.minimum(begin + BLOCKS, Ck)):
        vc = tl.load(value_centroids + (head64 * Ck + j) * HEAD_DIM + columns, mask=wide, other=0.0)
        place = (head64 * Cq + i) * Ck + j
        if ONE_TILE:
            s = _logits(q, key, head, first, end, L, scale, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
            top = tl.max(s, 1)
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            for low in range(first, end, BLOCK_N):
                stop = tl.minimum(low + BLOCK_N, end)
                s = _logits(q, key, head, low, stop, L, scale, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
                top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([BLOCK_M], tl.float32)
        if OUTPUT_ERROR:
            if ONE_TILE:
                w = tl.exp2(s - base[:, None])
                total = tl.sum(w, 1)
                v = load_rows(value, head, end - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                rounded = w.to(v.dtype)
                weight = tl.sum(rounded.to(tl.float32), 1)
                moved = tl.dot(rounded, v, input_precision=PRECISION)
            else:
                weight = tl.zeros([BLOCK_M], tl.float32)
                moved = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                for low in range(first, end, BLOCK_N):
                    stop = tl.minimum(low + BLOCK_N, end)
                    s = _logits(q, key, head, low, stop, L, scale, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
                    w = tl.exp2(s - base[:, None])
                    total += tl.sum(w, 1)
                    v = load_rows(value, head, stop - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                    rounded = w.to(v.dtype)
                    weight += tl.sum(rounded.to(tl.float32), 1)
                    moved = tl.dot(rounded, v, moved, input_precision=PRECISION)
            moved -= weight[:, None] * vc[None, :]
            lost = tl.sum(moved * moved, 1)
        else:
            lost = tl.zeros([BLOCK_M], tl.float32)
            middle = tl.load(center + place, mask=live, other=0.0) * LOG2_E
            ebar = tl.exp2(middle - base)
            size = tl.sum(vc * vc, 0)
            for low in range(first, end, BLOCK_N):
                stop = tl.minimum(low + BLOCK_N, end)
                inside = tl.arange(0, BLOCK_N) >= BLOCK_N - (stop - low)
                s = _logits(q, key, head, low, stop, L, scale, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
                w = tl.exp2(s - base[:, None])
                total += tl.sum(w, 1)
                v = load_rows(value, head, stop - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA).to(tl.float32)
                v = tl.where(inside[:, None], v - vc[None, :], 0.0)
                spread, across = tl.sum(v * v, 1), tl.sum(v * vc[None, :], 1)
                off = tl.where(inside[None, :], w - ebar[:, None], 0.0)
                terms = w * w * spread[None, :] + 2 * w * off * across[None, :] + off * off * size
                lost += tl.sum(terms, 1)
            tl.store(tops + place, top * LN_2, mask=live)
        tl.store(lse + place, (top + tl.log2(total)) * LN_2, mask=live)
        tl.store(error + place, (2 * top + tl.log2(tl.where(lost < 0, 0.0, lost))) * LN_2, mask=live)
        # Offsets are loaded one block before they are used: nothing waits for them.
        first = tl.load(offsets + tl.minimum(j + 1, Ck))
        end = tl.load(offsets + tl.minimum(j + 2, Ck))


def probe(
    query_centroids: Tensor,
    key: Tensor,
    value: Tensor,
    key_offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    scale: float,
    routing: str,
    largest_block: int | None = None,
    config: Config | None = None,
) -> Scores:
    """Scores of all blocks, as kernels/probe.py's function of this name."""
    if routing not in ("output_error", "svg_ear"):
        raise ValueError(f"unknown routing {routing!r}")
    B, H, L, D = key.shape
    Cq, Ck = query_centroids.shape[2], key_centroids.shape[2]
    rounded = query_centroids.to(key.dtype).contiguous()
    # In float32 the products of the rounded centroids are exact: what is left is the order of the sums.
    center = scale * (rounded.float() @ key_centroids.to(key.dtype).float().mT)
    error, lse = torch.empty_like(center), torch.empty_like(center)
    output_error = routing == "output_error"
    tops = error if output_error else torch.empty_like(center)
    one_tile = largest_block is not None and largest_block <= BLOCK_N
    c = config or probe_config_for(capability(key.device), D, key.dtype)
    options = meta(c, D, key.dtype, one_tile, output_error)
    keys = [key, value]
    if options["TMA"]:
        keys = [descriptor(x, BLOCK_N, options["BLOCK_D"]) for x in keys]
    grid = (triton.cdiv(Cq, options["BLOCK_M"]), triton.cdiv(Ck, options["BLOCKS"]), B * H)
    probe_kernel[grid](
        rounded, *keys, key_offsets, value_centroids.contiguous(), center, lse, error, tops, scale, L, Cq, Ck,
        **options,
    )  # fmt: skip
    row = lse.logsumexp(-1, keepdim=True) if output_error else tops.amax(-1, keepdim=True)
    sizes = key_offsets.diff(dim=-1)[:, :, None]
    count = sizes.log()
    mass = center.add_(count)
    gap = lse.sub_(mass).clamp_(min=0)
    error.sub_(2 * row).sub_(count).masked_fill_(~gap.isfinite(), torch.nan)
    return Scores(*(x.masked_fill_(sizes == 0, -torch.inf) for x in (error, mass, gap)))


def meta(c: Config, head_dim: int, dtype: torch.dtype, one_tile: bool, output_error: bool) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_M": c.block_m,
        "BLOCK_N": BLOCK_N, "BLOCKS": BLOCKS_PER_PROGRAM, "ONE_TILE": one_tile, "OUTPUT_ERROR": output_error,
        "TMA": c.tma, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
        "num_warps": c.num_warps, "num_stages": c.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
