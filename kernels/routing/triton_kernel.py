"""The kernels of kernels/routing/triton.py, which says what they compute."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_tiles import ordered_bits


@triton.jit
def shift_kernel(parts, shift, runs, Cq, OUTPUT_ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """shift [B,H,Cq] = 2 logsumexp of parts [B,H,runs,Cq] over the runs; for "svg_ear" twice their maximum."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for run in range(runs):
        part = tl.load(parts + (head * runs + run) * Cq + i, mask=i < Cq, other=0.0)
        above = tl.maximum(top, part)
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(top - base) + tl.exp(part - base)
        top = above
    if OUTPUT_ERROR:
        top += tl.log(total)
    tl.store(shift + head * Cq + i, 2 * top, mask=i < Cq)


@triton.jit
def _sizes(offsets, count, blocks):
    """Tokens of some blocks of one head; 0 after the last block."""
    inside = blocks < count
    low = tl.load(offsets + blocks, mask=inside, other=0)
    return tl.load(offsets + blocks + 1, mask=inside, other=0) - low


@triton.jit
def _found(state, at, DIGITS: tl.constexpr, PASSES: tl.constexpr):
    """Where the state before pass `at` lies: (key so far, area of larger keys)."""
    return state + PASSES * DIGITS + 1 + 2 * at


@triton.jit
def _next_digit(state, at, DIGITS: tl.constexpr, PASSES: tl.constexpr):
    """(key so far, area of larger keys) after pass `at`, which has filled its areas."""
    budget = tl.load(state + PASSES * DIGITS)
    d = tl.arange(0, DIGITS)
    area = tl.load(state + at * DIGITS + d)
    so_far = tl.load(_found(state, at, DIGITS, PASSES))
    larger = tl.load(_found(state, at, DIGITS, PASSES) + 1)
    upwards = tl.sum(area, 0) - tl.cumsum(area, 0)  # of larger digits
    digit = DIGITS - tl.sum((larger + upwards <= budget).to(tl.int64), 0)
    return so_far * DIGITS + digit, larger + tl.sum(tl.where(d > digit, area, 0), 0)


@triton.jit
def digits_kernel(
    error, shift, query_offsets, key_offsets, density, state, ties,
    H, Cq, Ck, video_queries, video_keys, stride_b, stride_h, stride_q, stride_k,
    PASS: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DIGITS: tl.constexpr, PASSES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Pass 0..3 sums areas by digit; pass 4 those of the blocks that equal the key found, row by row.

    A program takes ROWS query blocks of a head and all key blocks. FULL: the area of a pair of full blocks. Most
    pairs are full and are only counted; the areas of the others are added one by one.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    row = batch.to(tl.int64) * H + head
    state += batch.to(tl.int64) * STATE
    first = (head == 0) & (tl.program_id(0) == 0)
    if PASS == 0:
        if first:
            pairs = tl.zeros([], tl.int64)
            for h in range(H):
                queries = tl.load(query_offsets + (row + h) * (Cq + 1) + video_queries).to(tl.int64)
                pairs += queries * tl.load(key_offsets + (row + h) * (Ck + 1) + video_keys)
            budget = (pairs.to(tl.float64) * tl.load(density + batch)).to(tl.int64)
            tl.store(state + PASSES * DIGITS, budget)
        so_far = tl.zeros([], tl.uint32)
    else:
        so_far, larger = _next_digit(state, PASS - 1, DIGITS, PASSES)
        if first:
            tl.store(_found(state, PASS, DIGITS, PASSES), so_far)
            tl.store(_found(state, PASS, DIGITS, PASSES) + 1, larger)
        so_far = so_far.to(tl.uint32)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.where(i < video_queries, _sizes(query_offsets + row * (Cq + 1), Cq, i), 0)
    start = error + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    start += i.to(tl.int64)[:, None] * stride_q
    off = tl.load(shift + row * Cq + i, mask=i < Cq, other=0.0)
    found = tl.zeros([DIGITS], tl.int64)
    tied = tl.zeros([ROWS], tl.int64)
    for at in range(0, video_keys, COLUMNS):
        j = at + tl.arange(0, COLUMNS)
        columns = tl.where(j < video_keys, _sizes(key_offsets + row * (Ck + 1), Ck, j), 0)
        area = rows.to(tl.int64)[:, None] * columns[None, :]
        there = area > 0
        e = tl.load(start + j.to(tl.int64)[None, :] * stride_k, mask=there, other=0.0) - off[:, None]
        key = ordered_bits(e)
        there = there & (e == e)
        if PASS > 0:
            there = there & ((key >> (32 - 8 * PASS)) == so_far)
        if PASS == PASSES:
            tied += tl.sum(tl.where(there, area, 0), 1)
        else:
            digit = ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
            usual = there & (area == FULL)
            flat: tl.constexpr = ROWS * COLUMNS
            found += tl.histogram(tl.reshape(digit, [flat]), DIGITS, mask=tl.reshape(usual, [flat]))
            tl.atomic_add(state + PASS * DIGITS + digit, area, mask=there & (area != FULL), sem="relaxed")
    if PASS == PASSES:
        tl.store(ties + row * Cq + i, tied, mask=i < Cq)
    else:
        d = tl.arange(0, DIGITS)
        tl.atomic_add(state + PASS * DIGITS + d, found * FULL, mask=found > 0, sem="relaxed")


@triton.jit
def lists_kernel(
    kept, error, gap, shift, query_offsets, key_offsets, state, ties, bias, count, blocks, areas,
    H, Cq, Ck, video_queries, video_keys, stride_b, stride_h, stride_q, stride_k,
    CHOOSE: tl.constexpr, COMPENSATE: tl.constexpr, WITH_GAP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr,
    DIGITS: tl.constexpr, PASSES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Decides what is kept; writes lists, biases and areas for ROWS query blocks of a head at a time.

    CHOOSE: the key that digits_kernel found decides; otherwise kept [B,H,Cq,Ck] does.
    """
    head, batch = tl.program_id(1), tl.program_id(2)
    row = batch.to(tl.int64) * H + head
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = _sizes(query_offsets + row * (Cq + 1), Cq, i)
    start = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + i.to(tl.int64)[:, None] * stride_q
    out = (row * Cq + i.to(tl.int64))[:, None] * Ck
    listed = tl.zeros([ROWS], tl.int32)
    exact = tl.zeros([ROWS], tl.int64)
    executed = tl.zeros([ROWS], tl.int64)
    if CHOOSE:
        state += batch.to(tl.int64) * STATE
        found = _found(state, PASSES, DIGITS, PASSES)
        key_found = tl.load(found).to(tl.uint32)
        left = tl.load(state + PASSES * DIGITS) - tl.load(found + 1)
        off = tl.load(shift + row * Cq + i, mask=i < Cq, other=0.0)
        # Blocks that equal the key, in the rows before this one: few rows have any.
        own = tl.load(ties + row * Cq + i, mask=i < Cq, other=0)
        before = tl.cumsum(own, 0) - own
        if tl.sum(own, 0) > 0:
            ties += batch.to(tl.int64) * H * Cq
            first = head * Cq + tl.program_id(0) * ROWS
            for at in range(0, first, 1024):
                earlier = at + tl.arange(0, 1024)
                before += tl.sum(tl.load(ties + earlier, mask=earlier < first, other=0), 0)
    for at in range(0, Ck, COLUMNS):
        j = at + tl.arange(0, COLUMNS)
        columns = _sizes(key_offsets + row * (Ck + 1), Ck, j)
        inside = (i < Cq)[:, None] & (j < Ck)[None, :]
        place = start + j.to(tl.int64)[None, :] * stride_k
        video = (i < video_queries)[:, None] & (j < video_keys)[None, :]
        if CHOOSE:
            e = tl.load(error + place, mask=inside, other=0.0) - off[:, None]
            key = ordered_bits(e)
            area = rows.to(tl.int64)[:, None] * columns[None, :]
            tie = video & (e == e) & (key == key_found)
            spent = tl.where(tie, area, 0)
            through = before[:, None] + tl.cumsum(spent, 1)
            before += tl.sum(spent, 1)
            chosen = (e != e) | (key > key_found) | (tie & (through <= left))
            keep = (columns > 0)[None, :] & ((chosen & (rows > 0)[:, None]) | ~video)
        else:
            keep = tl.load(kept + out + j[None, :], mask=inside, other=0) != 0
        keep = keep & inside
        b = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
        if COMPENSATE:
            b = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.log(columns.to(tl.float32))[None, :]
            if WITH_GAP:
                b += tl.load(gap + place, mask=inside, other=0.0)
            b = tl.where(keep, float("-inf"), b)
        tl.store(bias + out + j[None, :], b, mask=inside)
        ones = keep.to(tl.int32)
        slot = listed[:, None] + tl.cumsum(ones, 1) - ones
        # The others go after the list, backwards, so that every place holds a block.
        slot = tl.where(keep, slot, Ck - 1 - (j[None, :] - slot))
        tl.store(blocks + out + slot, tl.zeros([ROWS, COLUMNS], tl.int32) + j[None, :], mask=inside)
        listed += tl.sum(ones, 1)
        counted = keep & video
        exact += tl.sum(tl.where(counted, columns[None, :], 0), 1).to(tl.int64)
        padded = (columns + (KEY_TILE - 1)) // KEY_TILE * KEY_TILE
        executed += tl.sum(tl.where(counted, padded[None, :], 0), 1).to(tl.int64)
    tl.store(count + row * Cq + i, listed, mask=i < Cq)
    tl.atomic_add(areas, tl.sum(exact * rows, 0), sem="relaxed")
    padded_rows = (rows + (QUERY_TILE - 1)) // QUERY_TILE * QUERY_TILE
    tl.atomic_add(areas + 1, tl.sum(executed * padded_rows, 0), sem="relaxed")
