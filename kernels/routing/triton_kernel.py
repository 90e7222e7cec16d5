"""The kernels of kernels/routing/triton.py, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

# Of an error that is NaN; others are at most MOST_CODE.
_UNKNOWN = tl.constexpr(65535)


@triton.jit
def _shift(parts, runs, Cq, i, OUTPUT_ERROR: tl.constexpr):
    """2 logsumexp of parts [runs,Cq] over the runs; for "svg_ear" twice their maximum."""
    top = tl.full(i.shape, float("-inf"), tl.float32)
    total = tl.zeros(i.shape, tl.float32)
    for run in range(runs):
        part = tl.load(parts + run * Cq + i, mask=i < Cq, other=0.0)
        above = tl.maximum(top, part)
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - base) + tl.exp(part - base)
        top = above
    if OUTPUT_ERROR:
        top += tl.log(total)
    return 2 * top


@triton.jit
def shift_kernel(parts, shift, runs, Cq, OUTPUT_ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """shift [B,H,Cq]: _shift of parts [B,H,runs,Cq]."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(shift + head * Cq + i, _shift(parts + head * runs * Cq, runs, Cq, i, OUTPUT_ERROR), mask=i < Cq)


@triton.jit
def _sizes(offsets, count, blocks):
    """Tokens of some blocks of one head; 0 after the last block."""
    inside = blocks < count
    low = tl.load(offsets + blocks, mask=inside, other=0)
    return tl.load(offsets + blocks + 1, mask=inside, other=0) - low


@triton.jit
def _tile(x, start, i, j, Cq, Ck, stride_k):
    """x of query blocks i, which begin at `start`, and key blocks j; 0 after the last blocks."""
    inside = (i < Cq)[:, None] & (j < Ck)[None, :]
    return tl.load(x + start + j.to(tl.int64)[None, :] * stride_k, mask=inside, other=0)


@triton.jit
def _found(state, at: tl.constexpr, DIGITS: tl.constexpr, PASSES: tl.constexpr):
    """(the first `at` digits of the code, area of the blocks above all codes that begin so)."""
    budget = tl.load(state + PASSES * DIGITS)
    d = tl.arange(0, DIGITS)
    code = tl.zeros([], tl.int32)
    larger = tl.zeros([], tl.int64)
    for number in tl.static_range(at):
        area = tl.load(state + number * DIGITS + d)
        upwards = tl.sum(area, 0) - tl.cumsum(area, 0)  # of larger digits
        digit = DIGITS - tl.sum((larger + upwards <= budget).to(tl.int32), 0)
        code = code * DIGITS + digit
        larger += tl.sum(tl.where(d > digit, area, 0), 0)
    return code, larger


@triton.jit
def search_kernel(
    error, codes, parts, query_offsets, key_offsets, density, state, ties,
    runs, H, Cq, Ck, video_queries, video_keys, stride_b, stride_h, stride_q, stride_k,
    PASS: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIPS: tl.constexpr,
    LEAST_ERROR: tl.constexpr, STEPS: tl.constexpr, MOST_CODE: tl.constexpr,
    BITS: tl.constexpr, PASSES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Pass 0..3 sums areas by digit; pass 4 those of the blocks of the code found, row by row.

    A program takes ROWS query blocks and STRIPS times COLUMNS key blocks of a head. Pass 0 writes the codes, of all
    blocks. Most pairs are of full blocks and are only counted: STRIPS counts fit into the BITS bits of each digit in a
    word. The areas of the others are added one by one.
    """
    DIGITS: tl.constexpr = 2**BITS
    row = tl.program_id(2).to(tl.int64)
    batch, head = row // H, row % H
    state += batch * STATE
    if PASS == 0:  # noqa: SIM102 - a constant, the other condition is not
        if (head == 0) & (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            pairs = tl.zeros([], tl.int64)
            for h in range(H):
                queries = tl.load(query_offsets + (row + h) * (Cq + 1) + video_queries).to(tl.int64)
                pairs += queries * tl.load(key_offsets + (row + h) * (Ck + 1) + video_keys)
            budget = (pairs.to(tl.float64) * tl.load(density + batch)).to(tl.int64)
            tl.store(state + PASSES * DIGITS, budget)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.where(i < video_queries, _sizes(query_offsets + row * (Cq + 1), Cq, i), 0)
    start = batch * stride_b + head * stride_h + i.to(tl.int64)[:, None] * stride_q
    code_so_far, _larger = _found(state, PASS, DIGITS, PASSES)
    if PASS == 0:
        off = _shift(parts + row * runs * Cq, runs, Cq, i, True)
    all_rows = (tl.min(rows, 0) == QUERY_TILE) & (tl.max(rows, 0) == QUERY_TILE)
    tied = tl.zeros([ROWS, COLUMNS], tl.int32)
    counts = tl.zeros([ROWS, COLUMNS], tl.uint64)
    first = tl.program_id(1) * STRIPS * COLUMNS
    # A tile is loaded while the one before it is worked on.
    source = error if PASS == 0 else codes
    following = _tile(source, start, i, first + tl.arange(0, COLUMNS), Cq, Ck, stride_k)
    for at in range(first, tl.minimum(first + STRIPS * COLUMNS, Ck), COLUMNS):
        j = at + tl.arange(0, COLUMNS)
        now, following = following, _tile(source, start, i, j + COLUMNS, Cq, Ck, stride_k)
        columns = tl.where(j < video_keys, _sizes(key_offsets + row * (Ck + 1), Ck, j), 0)
        if PASS == 0:
            e = now - off[:, None]
            code = tl.minimum(tl.maximum((e - LEAST_ERROR) * STEPS, 0.0), MOST_CODE).to(tl.int32)
            code = tl.where(e == e, code, _UNKNOWN)
            place = start + j.to(tl.int64)[None, :] * stride_k
            inside = (i < Cq)[:, None] & (j < Ck)[None, :]
            tl.store(codes + place, (code - 32768).to(tl.int16), mask=inside)
        else:
            code = now.to(tl.int32) + 32768
        there = (code != _UNKNOWN) & ((code >> (BITS * (PASSES - PASS))) == code_so_far)
        if PASS == PASSES:
            tied += tl.where(there, columns[None, :], 0)
        else:
            digit = (code >> (BITS * (PASSES - 1 - PASS))) & (DIGITS - 1)
            one = tl.full([ROWS, COLUMNS], 1, tl.uint64) << (BITS * digit).to(tl.uint64)
            if not (all_rows & (tl.min(columns, 0) == KEY_TILE) & (tl.max(columns, 0) == KEY_TILE)):
                full = (rows == QUERY_TILE)[:, None] & (columns == KEY_TILE)[None, :]
                others = there & ~full & (rows > 0)[:, None] & (columns > 0)[None, :]
                area = rows.to(tl.int64)[:, None] * columns[None, :]
                tl.atomic_add(state + PASS * DIGITS + digit, area, mask=others, sem="relaxed")
                there = there & full
            counts += tl.where(there, one, 0)
    if PASS == PASSES:
        spent = tl.sum(tied, 1).to(tl.int64) * rows
        tl.atomic_add(ties + row * Cq + i, spent, mask=(i < Cq) & (spent > 0), sem="relaxed")
    else:
        d = tl.arange(0, DIGITS)
        words = tl.reshape(counts, [ROWS * COLUMNS])
        each = (words[:, None] >> (BITS * d).to(tl.uint64)[None, :]) & (DIGITS - 1)
        found = tl.sum(each.to(tl.int32), 0).to(tl.int64) * (QUERY_TILE * KEY_TILE)
        tl.atomic_add(state + PASS * DIGITS + d, found, mask=found > 0, sem="relaxed")


@triton.jit
def lists_kernel(
    kept, codes, gap, query_offsets, key_offsets, state, ties, bias, count, blocks, areas,
    H, Cq, Ck, video_queries, video_keys, stride_b, stride_h, stride_q, stride_k,
    CHOOSE: tl.constexpr, COMPENSATE: tl.constexpr, WITH_GAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    BITS: tl.constexpr, PASSES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Decides what is kept; writes lists, biases and areas for ROWS query blocks of a head at a time.

    CHOOSE: the code that search_kernel found decides; otherwise kept [B,H,Cq,Ck] does.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    row = batch.to(tl.int64) * H + head
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _sizes(query_offsets + row * (Cq + 1), Cq, i)
    start = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + i.to(tl.int64)[:, None] * stride_q
    out = (row * Cq + i.to(tl.int64))[:, None] * Ck
    listed = tl.zeros([ROWS], tl.int32)
    exact = tl.zeros([ROWS, COLUMNS], tl.int32)
    executed = tl.zeros([ROWS, COLUMNS], tl.int32)
    if CHOOSE:
        state += batch.to(tl.int64) * STATE
        code_found, larger = _found(state, PASSES, 2**BITS, PASSES)
        left = tl.load(state + PASSES * 2**BITS) - larger
        # Blocks of the code that was found, in the rows before this one.
        own = tl.load(ties + row * Cq + i, mask=i < Cq, other=0)
        before = tl.cumsum(own, 0) - own
        some_tie = tl.sum(own, 0) > 0
        if some_tie:
            ties += batch.to(tl.int64) * H * Cq
            first = head * Cq + tl.program_id(0) * ROWS
            for at in range(0, first, 1024):
                earlier = at + tl.arange(0, 1024)
                before += tl.sum(tl.load(ties + earlier, mask=earlier < first, other=0), 0)
    # A tile is loaded while the one before it is worked on.
    key_offsets += row * (Ck + 1)
    j = tl.arange(0, COLUMNS)
    next_columns = _sizes(key_offsets, Ck, j)
    if CHOOSE:
        next_code = _tile(codes, start, i, j, Cq, Ck, stride_k)
    if COMPENSATE and WITH_GAP:
        next_gap = _tile(gap, start, i, j, Cq, Ck, stride_k)
    for at in range(0, Ck, COLUMNS):
        j = at + tl.arange(0, COLUMNS)
        columns, next_columns = next_columns, _sizes(key_offsets, Ck, j + COLUMNS)
        inside = (i < Cq)[:, None] & (j < Ck)[None, :]
        video = (i < video_queries)[:, None] & (j < video_keys)[None, :]
        if CHOOSE:
            code = next_code.to(tl.int32) + 32768
            next_code = _tile(codes, start, i, j + COLUMNS, Cq, Ck, stride_k)
            chosen = code > code_found
            if some_tie:
                tie = video & (code == code_found)
                keys = tl.where(tie, columns[None, :], 0)
                through = before[:, None] + tl.cumsum(keys, 1).to(tl.int64) * rows[:, None]
                before += tl.sum(keys, 1).to(tl.int64) * rows
                chosen = chosen | (tie & (through <= left))
            keep = (columns > 0)[None, :] & ((chosen & (rows > 0)[:, None]) | ~video)
        else:
            keep = tl.load(kept + out + j[None, :], mask=inside, other=0) != 0
        keep = keep & inside
        b = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        if COMPENSATE:
            b = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.log(columns.to(tl.float32))[None, :]
            if WITH_GAP:
                b += next_gap
                next_gap = _tile(gap, start, i, j + COLUMNS, Cq, Ck, stride_k)
            b = tl.where(keep, float("-inf"), b)
        tl.store(bias + out + j[None, :], b, mask=inside)
        ones = keep.to(tl.int32)
        slot = listed[:, None] + tl.cumsum(ones, 1) - ones
        # The others go after the list, backwards, so that every place holds a block.
        slot = tl.where(keep, slot, Ck - 1 - (j[None, :] - slot))
        tl.store(blocks + out + slot, tl.zeros([ROWS, COLUMNS], tl.int32) + j[None, :], mask=inside)
        listed += tl.sum(ones, 1)
        counted = keep & video
        exact += tl.where(counted, columns[None, :], 0)
        padded = (columns + (KEY_TILE - 1)) // KEY_TILE * KEY_TILE
        executed += tl.where(counted, padded[None, :], 0)
    tl.store(count + row * Cq + i, listed, mask=i < Cq)
    tl.atomic_add(areas, tl.sum(tl.sum(exact, 1).to(tl.int64) * rows, 0), sem="relaxed")
    padded_rows = (rows + (QUERY_TILE - 1)) // QUERY_TILE * QUERY_TILE
    tl.atomic_add(areas + 1, tl.sum(tl.sum(executed, 1).to(tl.int64) * padded_rows, 0), sem="relaxed")
