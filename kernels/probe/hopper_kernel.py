"""The kernel of kernels/probe/hopper.py, which says how it works."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..hopper_tiles import BLOCK, LOG2_E, LOGITS, ROWS, STEP, TILE, load_tile, new_ring, reinterpret
from ..plan import KEY_BLOCK

_LN_2 = gl.constexpr(0.6931471805599453)
_OF_BLOCK = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEY_BLOCK, 16]))  # [ROWS, BLOCK]
_ROW = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEY_BLOCK, 16])))
_CENTERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_CENTER = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _log2(x, SMALL: gl.constexpr = False):
    """The GPU's own, right to 2^-22; gl.log2 is a polynomial, and each row is on four threads. Below 2^-126 x counts
    as 0, unless SMALL."""
    instruction: gl.constexpr = "lg2.approx.f32 $0, $1;" if SMALL else "lg2.approx.ftz.f32 $0, $1;"
    return gl.inline_asm_elementwise(instruction, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _bound(offsets, j, number):
    """Where key block j of the run begins; after its end, where it ends."""
    return gl.load(offsets + gl.minimum(j, number))


@gluon.jit
def _load(sources, head, offsets, begin, number, key_ring, value_ring):
    """The loading warp. Offsets are read one step before they are used."""
    key, value, key_centroids = sources
    load_tile(key_centroids, head, begin, begin + BLOCK, key_ring, 0)
    stop0, stop1 = _bound(offsets, 1, number), _bound(offsets, 2, number)
    for j in range(0, number, 2):
        first0, first1 = stop0 - BLOCK, stop1 - BLOCK
        stop0, stop1 = _bound(offsets, j + 3, number), _bound(offsets, j + 4, number)
        load_tile(key, head, first0, first1, key_ring, j // 2 + 1)
        load_tile(value, head, first0, first1, value_ring, j // 2)


@gluon.jit
def _let_pass(number, key_ring, value_ring):
    """A group without query centroids: it is done with every tile."""
    keys, k_ready, k_free = key_ring
    _values, v_ready, v_free = value_ring
    STAGES: gl.constexpr = keys.shape[0]
    steps = (number + 1) // 2
    for step in range(steps + 1):
        mbarrier.wait(k_ready.index(step % STAGES), step // STAGES & 1)
        mbarrier.arrive(k_free.index(step % STAGES), count=1)
        if step < steps:
            mbarrier.wait(v_ready.index(step % STAGES), step // STAGES & 1)
            mbarrier.arrive(v_free.index(step % STAGES), count=1)


@gluon.jit
def _blocks(s):
    """[ROWS, STEP] to the two key blocks' [ROWS, BLOCK]; no number changes threads."""
    s0, s1 = gl.split(gl.permute(gl.reshape(s, [ROWS, 2, BLOCK]), [0, 2, 1]))
    return gl.convert_layout(s0, _OF_BLOCK), gl.convert_layout(s1, _OF_BLOCK)


@gluon.jit
def _counted(x, size, other):
    """A window ends where its block ends: only its last `size` slots count."""
    inside = gl.arange(0, BLOCK, gl.SliceLayout(0, _OF_BLOCK)) >= BLOCK - size
    return gl.where(inside[None, :], x, other)


@gluon.jit
def _base(top):
    """What is subtracted from logits: 0 instead of -inf, since exp2(-inf - -inf) is NaN."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def _weights(s, scale):
    """(m, w, W)"""
    top = gl.max(s, 1) * scale
    w = gl.exp2(s * scale - _base(top)[:, None])
    return top, w, gl.sum(w, 1)


@gluon.jit
def _gap(top, total, size, center, run_top, run_total, gap, live):
    """Stores the gap. Returns the run's c_i, as (maximum, sum), and the error but for log lost."""
    lse = top + _log2(total)
    above = gl.maximum(run_top, lse)
    run_total = run_total * gl.exp2(run_top - _base(above)) + gl.exp2(lse - _base(above))
    log_size = _log2(gl.maximum(size, 1).to(gl.float32))
    more = lse - log_size - center
    # An infinite key may leave logits that are in order, but not the centroid of its block.
    known = gl.abs(more) < float("inf")
    more = gl.where(more < 0, 0.0, more)
    gl.store(gap, gl.where(size > 0, more * _LN_2, float("-inf")), mask=live)
    return above, run_total, gl.where(known, 2 * top - log_size, float("nan"))


@gluon.jit
def _error(moved, but_lost, size, error, live):
    lost = gl.convert_layout(gl.sum(moved * moved, 1), _ROW)
    gl.store(error, gl.where(size > 0, (but_lost + _log2(lost, True)) * _LN_2, float("-inf")), mask=live)


@gluon.jit
def _score(centroids, first, Cq, keys_of_run, scores, scale, memory, GROUP: gl.constexpr):
    """ROWS query centroids from `first` on: four warps."""
    offsets, number = keys_of_run
    error, gap, parts, row_stride = scores
    queries, centers, key_ring, value_ring = memory
    keys, k_ready, k_free = key_ring
    values, v_ready, v_free = value_ring
    STAGES: gl.constexpr = keys.shape[0]
    D: gl.constexpr = queries.shape[2]
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    outputs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, outputs, 2)

    i = first + gl.arange(0, ROWS, gl.SliceLayout(1, rows))
    where = i[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, rows))[None, :]
    q = queries.index(GROUP)
    q.store(gl.load(centroids + where, mask=(i < Cq)[:, None], other=0.0))
    fence_async_shared()

    # The logits of the run's key centroids wait in shared memory, a line for each key block.
    no_logits = gl.zeros([ROWS, STEP], gl.float32, LOGITS)
    mbarrier.wait(k_ready.index(0), 0)
    with_centroids = warpgroup_mma(q, keys.index(0).permute((1, 0)), no_logits, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    center, _unused = _blocks(with_centroids)
    reinterpret(centers, [2, BLOCK, ROWS], _CENTERS).index(GROUP).permute((1, 0)).store(center * scale)

    row = first + gl.arange(0, ROWS, _ROW)
    live = row < Cq
    error += row
    gap += row
    no_output = gl.zeros([ROWS, D], gl.float32, outputs)
    run_top = gl.full([ROWS], float("-inf"), gl.float32, _ROW)
    run_total = gl.zeros([ROWS], gl.float32, _ROW)
    bound0, bound1 = _bound(offsets, 0, number), _bound(offsets, 1, number)
    bound2 = _bound(offsets, 2, number)
    for j in range(0, number, 2):
        size0, size1 = bound1 - bound0, bound2 - bound1
        bound0, bound1 = bound2, _bound(offsets, j + 3, number)
        bound2 = _bound(offsets, j + 4, number)
        step = j // 2
        stage = (step + 1) % STAGES
        mbarrier.wait(k_ready.index(stage), (step + 1) // STAGES & 1)
        s = warpgroup_mma(q, keys.index(stage).permute((1, 0)), no_logits, use_acc=False)
        mbarrier.arrive(k_free.index(stage), count=1)
        s0, s1 = _blocks(s)
        if size0 + size1 < STEP:
            s0, s1 = _counted(s0, size0, float("-inf")), _counted(s1, size1, float("-inf"))
        top0, w0, total0 = _weights(s0, scale)
        top1, w1, total1 = _weights(s1, scale)
        w0 -= (total0 * (1.0 / gl.maximum(size0, 1).to(gl.float32)))[:, None]
        w1 -= (total1 * (1.0 / gl.maximum(size1, 1).to(gl.float32)))[:, None]
        if size0 + size1 < STEP:
            w0, w1 = _counted(w0, size0, 0.0), _counted(w1, size1, 0.0)
        w0 = gl.convert_layout(w0.to(values.dtype), operand)
        w1 = gl.convert_layout(w1.to(values.dtype), operand)
        stage = step % STAGES
        mbarrier.wait(v_ready.index(stage), step // STAGES & 1)
        v = values.index(stage)
        moved0 = warpgroup_mma(w0, v.slice(0, BLOCK), no_output, use_acc=False, is_async=True)
        moved1 = warpgroup_mma(w1, v.slice(BLOCK, BLOCK), no_output, use_acc=False, is_async=True)
        center0 = centers.index(GROUP * BLOCK + j).load(_ROW)
        center1 = centers.index(GROUP * BLOCK + j + 1).load(_ROW)
        both = live & (j + 1 < number)
        run_top, run_total, but_lost0 = _gap(top0, total0, size0, center0, run_top, run_total, gap, live)
        gap += row_stride
        run_top, run_total, but_lost1 = _gap(top1, total1, size1, center1, run_top, run_total, gap, both)
        gap += row_stride
        moved0 = warpgroup_mma_wait(1, deps=[moved0])
        _error(moved0, but_lost0, size0, error, live)
        error += row_stride
        moved1 = warpgroup_mma_wait(0, deps=[moved1])
        mbarrier.arrive(v_free.index(stage), count=1)
        _error(moved1, but_lost1, size1, error, both)
        error += row_stride
    gl.store(parts + row, (run_top + _log2(run_total)) * _LN_2, mask=live)


@gluon.jit
def _compute(centroids, first, Cq, keys_of_run, scores, scale, memory, GROUP: gl.constexpr):
    first += GROUP * ROWS
    if first < Cq:
        _score(centroids, first, Cq, keys_of_run, scores, scale, memory, GROUP)
    else:
        _let_pass(keys_of_run[1], memory[2], memory[3])


@gluon.jit
def probe_kernel(
    query_centroids, key, value, key_offsets, key_centroids, error, gap, parts, scale, run, Cq, Ck, row_stride,
    HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """See kernels/probe/hopper.py. All is in units of log 2 until it is stored. run: key blocks per program, at most
    BLOCK; error, parts: as of kernels/probe/triton_kernel.py."""
    head, runs = gl.program_id(2), gl.num_programs(1)
    head64 = head.to(gl.int64)
    begin = gl.program_id(1) * run
    number = gl.minimum(Ck - begin, run)
    start = (head64 * Ck + begin) * row_stride
    scores = (error + start, gap + start, parts + (head64 * runs + gl.program_id(1)) * Cq, row_stride)
    offsets = key_offsets + head64 * (Ck + 1) + begin
    centroids = query_centroids + head64 * Cq * HEAD_DIM
    first = gl.program_id(0) * (2 * ROWS)

    dtype: gl.constexpr = query_centroids.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [2, ROWS, HEAD_DIM], TILE)
    centers = gl.allocate_shared_memory(gl.float32, [2 * BLOCK, ROWS], _CENTER)
    key_ring, value_ring = new_ring(dtype, STAGES, HEAD_DIM), new_ring(dtype, STAGES, HEAD_DIM)
    fence_async_shared()
    memory = (queries, centers, key_ring, value_ring)
    scale *= LOG2_E
    keys_of_run = (offsets, number)
    gl.warp_specialize(
        [
            (_compute, (centroids, first, Cq, keys_of_run, scores, scale, memory, gl.constexpr(0))),
            (_compute, (centroids, first, Cq, keys_of_run, scores, scale, memory, gl.constexpr(1))),
            (_load, ((key, value, key_centroids), head, offsets, begin, number, key_ring, value_ring)),
        ],
        [4, 1],
        [240, 24],  # registers per thread of the second group and of the loading warp
    )
