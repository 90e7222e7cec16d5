"""The kernels of kernels/probe/triton.py, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import LN_2, LOG2_E, load_rows


@triton.jit
def _inside(size, BLOCK_N: tl.constexpr):
    """Which slots of a window count: the last `size`."""
    return tl.arange(0, BLOCK_N) >= BLOCK_N - size


@triton.jit
def _logits(q, key, head, stop, size, length, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
            BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """q.k of the window that ends before slot `stop`; -inf but for its last `size` slots."""
    k = load_rows(key, head, stop - BLOCK_N, length, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if size < BLOCK_N:
        s = tl.where(_inside(size, BLOCK_N)[None, :], s, float("-inf"))
    return s


@triton.jit
def _base(top):
    """What is subtracted from logits: 0 instead of -inf, since exp2(-inf - -inf) is NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _moved(w, mean, value, head, stop, size, length, moved, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
           BLOCK_D: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """moved + sum_t (w_t - mean) v_t over the last `size` slots of a window."""
    v = load_rows(value, head, stop - BLOCK_N, length, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
    w -= mean[:, None]
    if size < BLOCK_N:
        w = tl.where(_inside(size, BLOCK_N)[None, :], w, 0.0)
    return tl.dot(w.to(v.dtype), v, moved, input_precision=PRECISION)


@triton.jit
def _lost(w, ebar, norms, head, stop, size, length, mean_norm, BLOCK_N: tl.constexpr):
    """sum_t |w_t v_t - ebar vc|^2 over the last `size` slots of a window; norms: spread_kernel's."""
    slots = stop - BLOCK_N + tl.arange(0, BLOCK_N)
    inside = _inside(size, BLOCK_N)
    where = norms + (head.to(tl.int64) * length + slots) * 2
    spread = tl.load(where, mask=inside, other=0.0)[None, :]
    across = tl.load(where + 1, mask=inside, other=0.0)[None, :]
    off = tl.where(inside[None, :], w - ebar[:, None], 0.0)
    return tl.sum(w * (w * spread + 2 * off * across) + off * off * mean_norm, 1)


@triton.jit
def probe_kernel(
    query_centroids, key, value, key_offsets, key_centroids, value_centroids, error, gap, mass, parts,
    scale, L, Cq, Ck, row_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, ONE_TILE: tl.constexpr, OUTPUT_ERROR: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See kernels/probe/triton.py. All is in units of log 2 until it is stored. error: without c_i. parts: c_i over
    the program's own run of key blocks. value: the norms of spread_kernel where OUTPUT_ERROR is not set."""
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
    begin = tl.program_id(1) * BLOCKS

    # The logits of the centroids are kept in gap until the loop reaches their block.
    blocks = begin + tl.arange(0, BLOCKS)
    here = blocks < Ck
    kc = tl.load(
        key_centroids + (head64 * Ck + blocks)[:, None] * HEAD_DIM + columns[None, :],
        mask=here[:, None] & wide[None, :], other=0.0,
    )  # fmt: skip
    start = (head64 * Ck + begin) * row_stride
    error += start
    gap += start
    centers = tl.dot(q, kc.T, input_precision=PRECISION) * scale
    place = tl.arange(0, BLOCKS)[None, :] * row_stride + i[:, None]
    tl.store(gap + place, centers, mask=live[:, None] & here[None, :])
    tl.debug_barrier()

    offsets = key_offsets + head64 * (Ck + 1)
    first, end = tl.load(offsets + begin), tl.load(offsets + begin + 1)
    run_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    run_total = tl.zeros([BLOCK_M], tl.float32)
    for j in range(begin, tl.minimum(begin + BLOCKS, Ck)):
        center = tl.load(gap + i, mask=live, other=0.0)
        n = end - first
        count = tl.maximum(n, 1).to(tl.float32)
        if ONE_TILE:
            s = _logits(q, key, head, end, n, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
            top = tl.max(s, 1) * scale
            w = tl.exp2(s * scale - _base(top)[:, None])
            total = tl.sum(w, 1)
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            for low in range(first, end, BLOCK_N):
                stop = tl.minimum(low + BLOCK_N, end)
                s = _logits(q, key, head, stop, stop - low, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
                above = tl.maximum(top, tl.max(s, 1) * scale)
                w = tl.exp2(s * scale - _base(above)[:, None])
                total = total * tl.exp2(top - _base(above)) + tl.sum(w, 1)
                top = above
        base = _base(top)
        if OUTPUT_ERROR:
            mean = total / count
            moved = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            if ONE_TILE:
                moved = _moved(
                    w, mean, value, head, end, n, L, moved, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION
                )
            else:
                for low in range(first, end, BLOCK_N):
                    stop = tl.minimum(low + BLOCK_N, end)
                    size = stop - low
                    s = _logits(q, key, head, stop, size, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
                    w = tl.exp2(s * scale - base[:, None])
                    moved = _moved(
                        w, mean, value, head, stop, size, L, moved, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION
                    )
            lost = tl.sum(moved * moved, 1)
        else:
            ebar = tl.exp2(center - base)
            vc = tl.load(value_centroids + (head64 * Ck + j) * HEAD_DIM + columns, mask=wide, other=0.0)
            vc = vc.to(tl.float32)
            mean_norm = tl.sum(vc * vc, 0)
            if ONE_TILE:
                lost = _lost(w, ebar, value, head, end, n, L, mean_norm, BLOCK_N)
            else:
                lost = tl.zeros([BLOCK_M], tl.float32)
                for low in range(first, end, BLOCK_N):
                    stop = tl.minimum(low + BLOCK_N, end)
                    size = stop - low
                    s = _logits(q, key, head, stop, size, L, BLOCK_N, HEAD_DIM, BLOCK_D, TMA, PRECISION)
                    w = tl.exp2(s * scale - base[:, None])
                    lost += _lost(w, ebar, value, head, stop, size, L, mean_norm, BLOCK_N)
            lost = tl.where(lost < 0, 0.0, lost)
        lse = top + tl.log2(total)
        above = tl.maximum(run_top, lse if OUTPUT_ERROR else top)
        run_total = run_total * tl.exp2(run_top - _base(above)) + tl.exp2(lse - _base(above))
        run_top = above
        more = lse - tl.log2(count) - center
        # An infinite key may leave logits that are in order, but not the centroid of its block.
        known = tl.abs(more) < float("inf")
        fault = tl.where(known, 2 * top + tl.log2(lost) - tl.log2(count), float("nan"))
        more = tl.where(more < 0, 0.0, more)
        tl.store(error + i, tl.where(n > 0, fault * LN_2, float("-inf")), mask=live)
        tl.store(gap + i, tl.where(n > 0, more * LN_2, float("-inf")), mask=live)
        if not OUTPUT_ERROR:
            weight = (center + tl.log2(count)) * LN_2
            tl.store(mass + start + i, tl.where(n > 0, weight, float("-inf")), mask=live)
            mass += row_stride
        error += row_stride
        gap += row_stride
        # Offsets are loaded one block before they are used: nothing waits for them.
        first = tl.load(offsets + tl.minimum(j + 1, Ck))
        end = tl.load(offsets + tl.minimum(j + 2, Ck))
    if OUTPUT_ERROR:
        run_top += tl.log2(run_total)
    runs = tl.num_programs(1)
    tl.store(parts + (head64 * runs + tl.program_id(1)) * Cq + i, run_top * LN_2, mask=live)


@triton.jit
def spread_kernel(
    value, key_offsets, value_centroids, norms, L, Ck,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """|v_t - vc_j|^2 and <v_t - vc_j, vc_j> of every token, one after the other: norms [B,H,L,2] float32."""
    head = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    wide = columns < HEAD_DIM
    vc = tl.load(value_centroids + (head * Ck + block) * HEAD_DIM + columns, mask=wide, other=0.0)
    vc = vc.to(tl.float32)
    offsets = key_offsets + head * (Ck + 1) + block
    end = tl.load(offsets + 1)
    for at in range(tl.load(offsets), end, ROWS):
        slots = at + tl.arange(0, ROWS)
        where = value + (head * L + slots)[:, None] * HEAD_DIM + columns[None, :]
        v = tl.load(where, mask=(slots < end)[:, None] & wide[None, :], other=0.0).to(tl.float32)
        v -= vc[None, :]
        out = norms + (head * L + slots) * 2
        tl.store(out, tl.sum(v * v, 1), mask=slots < end)
        tl.store(out + 1, tl.sum(v * vc[None, :], 1), mask=slots < end)
