"""The Triton kernel of kernels/attention/triton.py: formula, shapes and layout are there."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import LN_2, LOG2_E, load_rows


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
    """acc + share * queries @ matrix. The queries, at `rows`, are read from memory again, a few columns at a
    time: registers hold no more."""
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
    scale, H, L, Cq, Ck, tiles, n, group,
    query_stride_b, query_stride_h, query_stride_l, out_stride_b, out_stride_h, out_stride_l,
    exact_stride_b, exact_stride_h, exact_stride_l,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, EXACT: tl.constexpr, CENTROIDS: tl.constexpr, TERMS: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, WALK: tl.constexpr, PAIR: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CENTROID_STAGES: tl.constexpr,
):  # fmt: skip
    """See kernels/attention/triton.py. EXACT, CENTROIDS: the streams; without EXACT the state comes from exact and
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
            number = (batch.to(tl.int64) * n + place) * tl.cdiv(Cq, group) + block // group
            matrix = matrices + number * HEAD_DIM * HEAD_DIM
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
