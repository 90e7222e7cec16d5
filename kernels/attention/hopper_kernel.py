"""The kernel of kernels/attention/hopper.py, which says how it works."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..hopper_tiles import BLOCK, LOG2_E, LOGITS, ROWS, STEP, TILE, load_tile, new_ring

_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # [STEP], one number per thread


@gluon.jit
def _pair(kept, at, count):
    """Entries `at` and `at + 1` of a list of kept blocks; after its end the last one; 0 if the list is empty."""
    last = gl.maximum(count - 1, 0)
    first = gl.load(kept + gl.minimum(at, last), mask=count > 0, other=0)
    second = gl.load(kept + gl.minimum(at + 1, last), mask=count > 0, other=0)
    return first, second


@gluon.jit
def _sizes(offsets, block0, block1):
    """Numbers of keys."""
    size0 = gl.load(offsets + block0 + 1) - gl.load(offsets + block0)
    size1 = gl.load(offsets + block1 + 1) - gl.load(offsets + block1)
    return size0, size1


@gluon.jit
def _load(sources, head, kept, key_offsets, count, Ck, key_ring, value_ring, terms, TERMS: gl.constexpr):
    """The loading warp. Indices are read two steps and offsets one step before they are used."""
    key, value, key_centroids, value_centroids = sources
    block0, block1 = _pair(kept, 0, count)
    stop0 = gl.load(key_offsets + block0 + 1)
    stop1 = gl.load(key_offsets + block1 + 1)
    block0, block1 = _pair(kept, 2, count)
    centroid_steps = (Ck + STEP - 1) // STEP
    for step in range(centroid_steps):
        at = step * STEP
        load_tile(key_centroids, head, at, at + BLOCK, key_ring, step)
        load_tile(value_centroids, head, at, at + BLOCK, value_ring, step)
    for at in range(0, count, 2):
        step = centroid_steps + at // 2
        load_tile(key, head, stop0 - BLOCK, stop1 - BLOCK, key_ring, step)
        load_tile(value, head, stop0 - BLOCK, stop1 - BLOCK, value_ring, step)
        stop0 = gl.load(key_offsets + block0 + 1)
        stop1 = gl.load(key_offsets + block1 + 1)
        block0, block1 = _pair(kept, at + 4, count)
    if TERMS:
        matrices, place, matrix = terms
        if place >= 0:  # with head_dim 64 the second window is outside, and so zero
            load_tile(matrices, matrix, 0, BLOCK, value_ring, centroid_steps + (count + 1) // 2)


@gluon.jit
def _centroid_bias(bias, at, Ck, unscale):
    """[STEP] in _LINE: what to add to the products of queries and centroids; after the last one -inf."""
    c = at + gl.arange(0, STEP, _LINE)
    return gl.load(bias + c, mask=c < Ck, other=float("-inf")) * unscale


@gluon.jit
def _of_every_row(bias):
    """[STEP] in _LINE to [ROWS, STEP]."""
    row = gl.convert_layout(bias, gl.SliceLayout(0, LOGITS))[None, :]
    return gl.broadcast(row, gl.zeros([ROWS, STEP], gl.float32, LOGITS))[0]


@gluon.jit
def _counted(s, size0, size1):
    """The logits of two windows of these sizes. A window ends where its block ends: only its last slots count."""
    if size0 + size1 < STEP:
        slot = gl.arange(0, STEP, gl.SliceLayout(0, LOGITS))
        counts = gl.where(slot < BLOCK, slot >= BLOCK - size0, slot >= STEP - size1)
        s = gl.where(counts[None, :], s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, scale, top, total):
    """Online softmax in units of log 2: (maximum, sum, weights, the factor by which earlier sums shrink)."""
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    base = gl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet: exp2(-inf - -inf) is NaN
    weights = gl.exp2(s * scale - base[:, None])
    shrink = gl.exp2(top - base)
    return new_top, total * shrink + gl.sum(weights, 1), weights, shrink


@gluon.jit
def _step(
    q, key_ring, value_ring, step, start, size0, size1, CENTROIDS: gl.constexpr, scale, p, top, total, acc
):
    """One tile's logits and softmax; the weights p of the previous tile are multiplied by their values. start: what
    the products of queries and centroids are added to. Those with the two windows of kept keys are added to nothing:
    an accumulator of zeros would cost as many instructions as the exponentials."""
    keys, k_ready, k_free = key_ring
    values, v_ready, v_free = value_ring
    STAGES: gl.constexpr = keys.shape[0]
    stage = step % STAGES
    before = (step - 1) % STAGES
    mbarrier.wait(k_ready.index(stage), step // STAGES & 1)
    s = warpgroup_mma(q, keys.index(stage).permute((1, 0)), start, use_acc=CENTROIDS, is_async=True)
    mbarrier.wait(v_ready.index(before), (step - 1) // STAGES & 1)
    acc = warpgroup_mma(p, values.index(before), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_free.index(stage), count=1)
    if not CENTROIDS:
        s = _counted(s, size0, size1)
    top, total, weights, shrink = _softmax(s, scale, top, total)
    new_p = gl.convert_layout(weights.to(values.dtype), p.type.layout)
    acc, p, new_p, total = warpgroup_mma_wait(0, deps=[acc, p, new_p, total])
    mbarrier.arrive(v_free.index(before), count=1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return new_p, top, total, acc


@gluon.jit
def _token_rows(query_order, first, end, stride, D: gl.constexpr, LAYOUT: gl.constexpr):
    """(offsets of the rows of tokens query_order[first + i], whether first + i < end)."""
    slots = first + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    token = gl.load(query_order + slots, mask=slots < end, other=0).to(gl.int64)
    columns = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    return token[:, None] * stride + columns[None, :], (slots < end)[:, None]


@gluon.jit
def _compute(
    tokens, lists, scale, queries, key_ring, value_ring, place, TERMS: gl.constexpr, GROUP: gl.constexpr
):
    """Half of the block's queries: four warps."""
    query, query_stride, out, out_stride, query_order, first, end = tokens
    kept, key_offsets, count, bias, Ck = lists
    keys, k_ready, k_free = key_ring
    values, v_ready, _v_free = value_ring
    D: gl.constexpr = queries.shape[2]
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, outputs, 2)

    q = queries.index(GROUP)
    where, inside = _token_rows(query_order, first + GROUP * ROWS, end, query_stride, D, rows)
    q.store(gl.load(query + where, mask=inside, other=0.0))
    fence_async_shared()

    unscale = LOG2_E / scale
    acc = gl.zeros([ROWS, D], gl.float32, outputs)
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, LOGITS))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))
    start = _of_every_row(_centroid_bias(bias, 0, Ck, unscale))
    b = _centroid_bias(bias, STEP, Ck, unscale)
    mbarrier.wait(k_ready.index(0), 0)
    s = warpgroup_mma(q, keys.index(0).permute((1, 0)), start)
    mbarrier.arrive(k_free.index(0), count=1)
    top, total, weights, _shrink = _softmax(s, scale, top, total)
    p = gl.convert_layout(weights.to(keys.dtype), operand)
    centroid_steps = (Ck + STEP - 1) // STEP
    for step in range(1, centroid_steps):
        start = _of_every_row(b)
        b = _centroid_bias(bias, (step + 1) * STEP, Ck, unscale)
        p, top, total, acc = _step(
            q, key_ring, value_ring, step, start, 0, 0, True, scale, p, top, total, acc
        )

    centroid_top, centroid_total = top, total
    zeros = gl.zeros([ROWS, STEP], gl.float32, LOGITS)
    # Indices are read two steps and sizes one step before they are used: nothing waits for them.
    block0, block1 = _pair(kept, 0, count)
    size0, size1 = _sizes(key_offsets, block0, block1)
    block0, block1 = _pair(kept, 2, count)
    for at in range(0, count, 2):
        size1 = gl.where(at + 1 < count, size1, 0)
        of_now = size0, size1
        size0, size1 = _sizes(key_offsets, block0, block1)
        block0, block1 = _pair(kept, at + 4, count)
        step = centroid_steps + at // 2
        p, top, total, acc = _step(
            q, key_ring, value_ring, step, zeros, *of_now, False, scale, p, top, total, acc
        )

    STAGES: gl.constexpr = keys.shape[0]
    step = centroid_steps + (count + 1) // 2 - 1
    mbarrier.wait(v_ready.index(step % STAGES), step // STAGES & 1)
    acc = warpgroup_mma(p, values.index(step % STAGES), acc)
    share = 1.0 / gl.where(total == 0.0, 1.0, total)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, outputs))[:, None]
    if TERMS:  # noqa: SIM102 - a constant, the other condition is not
        if place >= 0:
            nothing = centroid_top == float("-inf")
            skipped = gl.where(nothing, 0.0, centroid_total * gl.exp2(centroid_top - top) * share)
            mbarrier.wait(v_ready.index((step + 1) % STAGES), (step + 1) // STAGES & 1)
            tile = values.index((step + 1) % STAGES)
            if D < STEP:
                tile = tile.slice(0, D)
            linear = warpgroup_mma(q, tile, gl.zeros([ROWS, D], gl.float32, outputs), use_acc=False)
            acc += linear * gl.convert_layout(skipped, gl.SliceLayout(1, outputs))[:, None]
    q.store(acc.to(keys.dtype))
    where, inside = _token_rows(query_order, first + GROUP * ROWS, end, out_stride, D, rows)
    gl.store(out + where, q.load(rows), mask=inside)


@gluon.jit
def attention_kernel(
    query, key, value, key_centroids, value_centroids,
    query_order, query_offsets, key_offsets, bias, kept_count, kept_blocks, order,
    places, matrices, out,
    scale, H, L, Cq, Ck, n, group,
    query_stride_b, query_stride_h, query_stride_l, out_stride_b, out_stride_h, out_stride_l,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr, TERMS: gl.constexpr,
):  # fmt: skip
    """See kernels/attention/hopper.py. order: the query block of each program; STAGES: of the ring; TERMS: whether
    some of the heads have first-order terms."""
    rank, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    row = batch * H + head
    row64 = row.to(gl.int64)
    block = gl.load(order + row * Cq + rank)
    bounds = query_offsets + row * (Cq + 1) + block
    count = gl.load(kept_count + row * Cq + block)
    kept = kept_blocks + (row64 * Cq + block) * Ck
    query += batch.to(gl.int64) * query_stride_b + head.to(gl.int64) * query_stride_h
    out += batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    key_offsets += row * (Ck + 1)
    query_order += row64 * L
    tokens = (query, query_stride_l, out, out_stride_l, query_order, gl.load(bounds), gl.load(bounds + 1))
    lists = (kept, key_offsets, count, bias + (row64 * Cq + block) * Ck, Ck)

    dtype: gl.constexpr = query.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], TILE)
    key_ring, value_ring = new_ring(dtype, STAGES, HEAD_DIM), new_ring(dtype, STAGES, HEAD_DIM)
    fence_async_shared()
    scale *= LOG2_E
    sources = (key, value, key_centroids, value_centroids)
    place = -1
    if TERMS:
        place = gl.load(places + head)
    groups = (Cq + group - 1) // group
    terms = (matrices, place, (batch * n + place) * groups + block // group)
    gl.warp_specialize(
        [
            (_compute, (tokens, lists, scale, queries, key_ring, value_ring, place, TERMS, gl.constexpr(0))),
            (_compute, (tokens, lists, scale, queries, key_ring, value_ring, place, TERMS, gl.constexpr(1))),
            (_load, (sources, row, kept, key_offsets, count, Ck, key_ring, value_ring, terms, TERMS)),
        ],
        [4, 1],
        [240, 24],  # registers per thread of the second group and of the loading warp
    )
