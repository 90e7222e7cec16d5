"""Kept blocks exactly, skipped blocks by their centroids: one Triton kernel, one online softmax.

Formula (kernels/plan.py; arXiv 2603.08982). For a query q of block i, s(q,k) = scale q.k:

    num(q) = sum_{j kept} sum_{t in j} exp(s(q,k_t)) v_t + sum_j exp(s(q,kc_j) + bias_ij) vc_j
    den(q) = the same sums without the values;   out(q) = num(q) / den(q)

Shapes and layout: query, out and exact [B,H,L,D] in token order, any strides with D contiguous (they lie as
[B,L,H,D]); the tensors of the plan are contiguous. One program computes BLOCK_M queries of one block: it
gathers their rows through query_order, walks the block's kept list (first stream) and all centroids with the
bias as mask (second stream), and scatters the outputs. So only key and value are permuted through memory.

- Logits, maxima, sums and outputs are accumulated in float32, weights rounded to the input's dtype before the
  second product, exp2 with log2(e) folded into the scale. float32 inputs: three TF32 products each.
- A key tile is the window of BLOCK_N slots that ends where the block's part ends. What it holds too much are
  valid keys of the same head, or zeros; they get -inf. Slots past the valid keys are not read.
- Programs of a head start heaviest first; heads follow each other, so that a head's keys stay in L2.
- Deterministic: no atomics, sums in a fixed order. Nothing is read back; a CUDA graph can capture it.
- A query without any kept key or centroid: out 0 and lse -inf, as in scaled_dot_product_attention.
- Not supported: dropout, causal masks, grouped heads, gradients, head_dim > 256, a scale of 0 or below.

Two families of plans (`variable`): equal tiles, whose query blocks have at most 128 and key blocks at most 64
tokens, and clusters of any sizes, cut into tiles here (also right for equal tiles, but slower).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plan import KEY_BLOCK, QUERY_BLOCK, SparsePlan, Terms
from ..triton_configs import Config, config_for
from ..triton_tiles import LN_2, LOG2_E, capability, descriptor, load_rows, version
from .choice import MAX_HEAD_DIM, why_not_hopper


@triton.jit
def _bounds(offsets, block):
    return tl.load(offsets + block), tl.load(offsets + block + 1)


@triton.jit
def _ending_at(size, BLOCK: tl.constexpr):
    """Logit bias of a window's slots of which only the last `size` count."""
    return tl.where(tl.arange(0, BLOCK) >= BLOCK - size, 0.0, float("-inf"))


@triton.jit
def _step(q, k, v, bias, scale, top, total, acc, PRECISION: tl.constexpr):
    """One tile of keys into the online softmax; logits in units of log 2."""
    s = tl.dot(q, k.T, input_precision=PRECISION) * scale + bias[None, :]
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet: exp2(-inf - -inf) is NaN
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _step_pair(q, k0, v0, bias0, k1, v1, bias1, scale, top, total, acc, PRECISION: tl.constexpr):
    """Two tiles of keys with one maximum and one rescaling of the accumulator."""
    s0 = tl.dot(q, k0.T, input_precision=PRECISION)
    s1 = tl.dot(q, k1.T, input_precision=PRECISION)
    s0 = s0 * scale + bias0[None, :]
    s1 = s1 * scale + bias1[None, :]
    new_top = tl.maximum(top, tl.max(tl.maximum(s0, s1), 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p0 = tl.exp2(s0 - base[:, None])
    p1 = tl.exp2(s1 - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p0 + p1, 1)
    acc = tl.dot(p0.to(v0.dtype), v0, acc * shrink[:, None], input_precision=PRECISION)
    acc = tl.dot(p1.to(v1.dtype), v1, acc, input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _add_linear(acc, rows, in_block, share, matrix, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                CHUNK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """acc + share * queries @ matrix. A few columns of the queries at a time, which lie at `rows`, from
    memory again: registers hold no more."""
    columns = tl.arange(0, BLOCK_D)
    for start in tl.range(0, BLOCK_D, CHUNK, num_stages=1):
        part = start + tl.arange(0, CHUNK)
        x = tl.load(
            rows[:, None] + part[None, :], mask=in_block[:, None] & (part < HEAD_DIM)[None, :], other=0.0
        )
        m = tl.load(
            matrix + part[:, None] * HEAD_DIM + columns[None, :],
            mask=(part < HEAD_DIM)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot((x * share[:, None]).to(m.dtype), m, acc, input_precision=PRECISION)
    return acc


@triton.jit
def attention_kernel(
    query, key, value, key_centroids, value_centroids,
    query_order, query_offsets, key_offsets, bias, kept_count, kept_blocks,
    tile_block, tile_first, exact, lse, places, matrices, out,
    scale, H, L, Cq, Ck, tiles, n,
    query_stride_b, query_stride_h, query_stride_l, out_stride_b, out_stride_h, out_stride_l,
    exact_stride_b, exact_stride_h, exact_stride_l,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, EXACT: tl.constexpr, CENTROIDS: tl.constexpr, TERMS: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, WALK: tl.constexpr, PAIR: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CENTROID_STAGES: tl.constexpr,
):  # fmt: skip
    """The module's docstring. EXACT, CENTROIDS: the streams; without EXACT the state comes from exact and
    lse, without CENTROIDS lse is written. TERMS: whether some of the heads have first-order terms. PARTS:
    query tiles per block of equal tiles; 0: tile_block and tile_first say which. WALK: key blocks may be
    longer than BLOCK_N. PAIR: two kept blocks at once."""
    rank, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = batch * H + head
    row64 = row.to(tl.int64)
    if PARTS == 0:
        block = tl.load(tile_block + row * tiles + rank)
        if block < 0:
            return
        first = tl.load(tile_first + row * tiles + rank)
    else:
        block = tl.load(tile_block + row * Cq + rank // PARTS)
        first = (rank % PARTS) * BLOCK_M
    bounds = query_offsets + row * (Cq + 1) + block
    first += tl.load(bounds)
    end = tl.load(bounds + 1)
    if first >= end:
        return

    slots = first + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    in_block = slots < end
    token = tl.load(query_order + row64 * L + slots, mask=in_block, other=0).to(tl.int64)
    inside = in_block[:, None] & (columns < HEAD_DIM)[None, :]
    q = tl.load(
        query + batch.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
        + token[:, None] * query_stride_l + columns[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    scale = scale * LOG2_E

    if EXACT:
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        count = tl.load(kept_count + row * Cq + block)
        kept = kept_blocks + (row64 * Cq + block) * Ck
        offsets = key_offsets + row * (Ck + 1)
        last = tl.maximum(count - 1, 0)
        if WALK:
            steps = 0
            for at in range(0, count, 128):
                entries = at + tl.arange(0, 128)
                listed = tl.load(kept + entries, mask=entries < count, other=0)
                size = tl.load(offsets + listed + 1) - tl.load(offsets + listed)
                here = tl.maximum((size + BLOCK_N - 1) // BLOCK_N, 1)
                steps += tl.sum(tl.where(entries < count, here, 0), 0)
            # Indices are loaded two blocks and offsets one before they are used: nothing waits for them.
            entry = 0
            low, high = _bounds(offsets, tl.load(kept, mask=count > 0, other=0))
            j0 = tl.load(kept + tl.minimum(1, last), mask=count > 0, other=0)
            j1 = tl.load(kept + tl.minimum(2, last), mask=count > 0, other=0)
            next_low, next_high = _bounds(offsets, j0)
            for _ in tl.range(0, steps, num_stages=STAGES):
                stop = tl.minimum(low + BLOCK_N, high)
                k = load_rows(key, row, stop - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                v = load_rows(value, row, stop - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                top, total, acc = _step(
                    q, k, v, _ending_at(stop - low, BLOCK_N), scale, top, total, acc, PRECISION
                )
                finished = stop >= high
                low = tl.where(finished, next_low, stop)
                high = tl.where(finished, next_high, high)
                entry = tl.where(finished, entry + 1, entry)
                j0 = tl.where(finished, j1, j0)
                next_low, next_high = _bounds(offsets, j0)
                j1 = tl.load(kept + tl.minimum(entry + 2, last))
        elif PAIR:
            # Indices are loaded two steps and offsets one step before they are used: nothing waits for them.
            low0, stop0 = _bounds(offsets, tl.load(kept, mask=count > 0, other=0))
            low1, stop1 = _bounds(offsets, tl.load(kept + tl.minimum(1, last), mask=count > 0, other=0))
            j0 = tl.load(kept + tl.minimum(2, last), mask=count > 0, other=0)
            j1 = tl.load(kept + tl.minimum(3, last), mask=count > 0, other=0)
            for at in tl.range(0, count, 2, num_stages=STAGES):
                k0 = load_rows(key, row, stop0 - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                k1 = load_rows(key, row, stop1 - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                v0 = load_rows(value, row, stop0 - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                v1 = load_rows(value, row, stop1 - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                bias0 = _ending_at(stop0 - low0, BLOCK_N)
                bias1 = _ending_at(tl.where(at + 1 < count, stop1 - low1, 0), BLOCK_N)
                top, total, acc = _step_pair(
                    q, k0, v0, bias0, k1, v1, bias1, scale, top, total, acc, PRECISION
                )
                low0, stop0 = _bounds(offsets, j0)
                low1, stop1 = _bounds(offsets, j1)
                j0 = tl.load(kept + tl.minimum(at + 4, last))
                j1 = tl.load(kept + tl.minimum(at + 5, last))
        else:
            low, stop = _bounds(offsets, tl.load(kept, mask=count > 0, other=0))
            j = tl.load(kept + tl.minimum(1, last), mask=count > 0, other=0)
            for at in tl.range(0, count, num_stages=STAGES):
                k = load_rows(key, row, stop - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                v = load_rows(value, row, stop - BLOCK_N, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
                top, total, acc = _step(
                    q, k, v, _ending_at(stop - low, BLOCK_N), scale, top, total, acc, PRECISION
                )
                low, stop = _bounds(offsets, j)
                j = tl.load(kept + tl.minimum(at + 2, last))
    else:
        top = tl.load(lse + row64 * L + token, mask=in_block, other=float("-inf")) * LOG2_E
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.load(
            exact + batch.to(tl.int64) * exact_stride_b + head.to(tl.int64) * exact_stride_h
            + token[:, None] * exact_stride_l + columns[None, :],
            mask=inside, other=0.0,
        ).to(tl.float32)  # fmt: skip

    kept_lse = top + tl.log2(total)
    if CENTROIDS:
        biases = bias + (row64 * Cq + block) * Ck
        for at in tl.range(0, Ck, BLOCK_C, num_stages=CENTROID_STAGES):
            c = at + tl.arange(0, BLOCK_C)
            b = tl.load(biases + c, mask=c < Ck, other=float("-inf")) * LOG2_E
            k = load_rows(key_centroids, row, at, Ck, BLOCK_C, HEAD_DIM, BLOCK_D, TMA)
            v = load_rows(value_centroids, row, at, Ck, BLOCK_C, HEAD_DIM, BLOCK_D, TMA)
            top, total, acc = _step(q, k, v, b, scale, top, total, acc, PRECISION)
    else:
        tl.store(lse + row64 * L + token, (top + tl.log2(total)) * LN_2, mask=in_block)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if TERMS:
        place = tl.load(places + head)
        if place >= 0:
            base = tl.where(top == float("-inf"), 0.0, top)
            kept_share = tl.exp2(kept_lse - base) / tl.where(total == 0.0, 1.0, total)
            share = tl.where(total == 0.0, 0.0, tl.maximum(1.0 - kept_share, 0.0))
            matrix = matrices + ((batch.to(tl.int64) * n + place) * Cq + block) * HEAD_DIM * HEAD_DIM
            rows = (
                query + batch.to(tl.int64) * query_stride_b + head.to(tl.int64) * query_stride_h
                + token * query_stride_l
            )  # fmt: skip
            acc = _add_linear(acc, rows, in_block, share, matrix, HEAD_DIM, BLOCK_D, CHUNK, PRECISION)
    tl.store(
        out + batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
        + token[:, None] * out_stride_l + columns[None, :],
        acc.to(out.dtype.element_ty), mask=inside,
    )  # fmt: skip


def sparse_exact(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Writes the kept blocks' softmax into out [B,H,L,D]; returns (out, lse [B,H,L] float32)."""
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    _launch(query, plan, scale, out, None, lse, variable, config, None)
    return out, lse


def centroid_compensation(
    query: Tensor, exact: Tensor, lse: Tensor, plan: SparsePlan, scale: float, out: Tensor,
    variable: bool = True, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Writes the joint softmax of the exact part and the centroids into out and returns it."""
    _launch(query, plan, scale, out, exact, lse.contiguous(), variable, config, None)
    return out


def attend(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
    config: Config | None = None,
    terms: Terms | None = None,
) -> Tensor:
    """Both in one. Without a config the GPU's best kernel, which may be the one in hopper.py."""
    found = capability(query.device), query.dtype, query.shape[-1], variable, version()
    if config is None and scale > 0 and not why_not_hopper(*found):
        from . import hopper

        return hopper.attend(query, plan, scale, out, schedule(plan, QUERY_BLOCK, variable)[0], terms)
    _launch(query, plan, scale, out, None, None, variable, config, terms)
    return out


def schedule(plan: SparsePlan, block_m: int, variable: bool) -> tuple[Tensor, Tensor]:
    """(query block, first row in it) of every program, [B,H,tiles] int32 each, most kept blocks first.

    Equal tiles: the blocks alone, and the second tensor is unused. Otherwise as many tiles as there can be at
    most with these shapes; the surplus ones come last with block -1. Ties go to the lowest index.
    """
    if not variable:
        order = plan.kept_count.argsort(dim=-1, descending=True, stable=True).int()
        return order, order
    B, H, L = plan.query_order.shape
    Cq = plan.kept_count.shape[-1]
    tiles = (plan.query_offsets.diff(dim=-1) + (block_m - 1)).div(block_m, rounding_mode="floor")
    ends = tiles.cumsum(-1)
    rank = torch.arange(-(-L // block_m) + Cq, device=ends.device).expand(B, H, -1).contiguous()
    block = torch.searchsorted(ends, rank, right=True)
    inside = block < Cq
    known = block.clamp(max=Cq - 1)
    first = (rank - (ends - tiles).gather(-1, known)) * block_m
    weight = plan.kept_count.gather(-1, known).masked_fill(~inside, -1)
    heavy_first = weight.argsort(dim=-1, descending=True, stable=True)
    block = block.masked_fill(~inside, -1).gather(-1, heavy_first)
    return block.int(), first.gather(-1, heavy_first).int()


def _launch(
    query: Tensor, plan: SparsePlan, scale: float, out: Tensor, exact: Tensor | None, lse: Tensor | None,
    variable: bool, config: Config | None, terms: Terms | None,
) -> None:  # fmt: skip
    B, H, L, D = query.shape
    Cq, Ck = plan.bias.shape[-2:]
    if D > MAX_HEAD_DIM:
        raise ValueError(f"head_dim {D} is not supported: at most {MAX_HEAD_DIM}")
    if scale <= 0:
        raise ValueError(f"the scale of the logits must be positive, not {scale}")
    if query.stride(-1) != 1:
        query = query.contiguous()
    if exact is not None and exact.stride(-1) != 1:
        exact = exact.contiguous()
    c = config or config_for(capability(query.device), D, query.dtype, variable)
    streams = exact is None, exact is not None or lse is None, terms is not None
    options = meta(c, D, query.dtype, variable, *streams)
    tile_block, tile_first = schedule(plan, c.block_m, variable)
    tiles = tile_block.shape[-1] * max(options["PARTS"], 1)
    keys: list[Any] = [plan.key, plan.value, plan.key_centroids, plan.value_centroids]
    if c.tma:
        rows = (c.block_n, c.block_n, c.block_c, c.block_c)
        keys = [descriptor(x, n, options["BLOCK_D"]) for x, n in zip(keys, rows, strict=True)]
    state = out if exact is None else exact
    places, matrices = (plan.kept_count, plan.key) if terms is None else terms  # unused without terms
    attention_kernel[(tiles, H, B)](
        query, *keys, plan.query_order, plan.query_offsets, plan.key_offsets, plan.bias, plan.kept_count,
        plan.kept_blocks, tile_block, tile_first, state, plan.bias if lse is None else lse, places,
        matrices, out, scale, H, L, Cq, Ck, tiles, matrices.shape[1], *query.stride()[:3], *out.stride()[:3],
        *state.stride()[:3], **options,
    )  # fmt: skip


def meta(
    c: Config,
    head_dim: int,
    dtype: torch.dtype,
    variable: bool,
    exact: bool,
    centroids: bool,
    terms: bool = False,
) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    walk = variable or c.block_n < KEY_BLOCK
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n, "BLOCK_C": c.block_c, "EXACT": exact, "CENTROIDS": centroids,
        "TERMS": terms, "CHUNK": min(block_d, 16),
        "PARTS": 0 if variable else QUERY_BLOCK // c.block_m, "WALK": walk, "PAIR": c.pair and not walk,
        "TMA": c.tma, "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32", "STAGES": c.num_stages,
        "CENTROID_STAGES": c.centroid_stages, "num_warps": c.num_warps, "num_stages": c.num_stages,
        "enable_fp_fusion": True,
    }  # fmt: skip
