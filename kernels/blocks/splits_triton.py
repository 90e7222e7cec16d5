"""The three steps of one level of the balanced splits (kernels/blocks/splits_torch.py), straight from the tokens.

Formulas and arguments as there. x [G,N,D] of any strides with D contiguous: tokens are read through the
order, so that nothing of their size is ever written. One program takes a segment (`directions`, `partition`) or a
tile (`project`) of one head.

directions: at most SAMPLE tokens of a segment stay in registers for all power iterations.
partition: the pivot is the largest number below which fewer than half of the segment lie, found bit by bit;
    coordinates of up to TILE slots stay in registers, longer segments are read once per bit.

float32 arithmetic, sums in a fixed order, no atomics, nothing is read back: the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_tiles import ordered_bits
from .splits_torch import ITERATIONS, SAMPLE, SMALLEST_NORM, longest

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


def bytes_per_token(head_dim: int) -> int:
    """Working memory: two orders, coordinates, and a direction for each tile of 32 tokens or more."""
    return 12 + head_dim // 8


@triton.jit
def _edge(segment, segments, tiles, block, N):
    """The first slot of a segment."""
    return tl.minimum(tl.cdiv(segment * tiles, segments) * block, N)


@triton.jit(do_not_specialize=["segments"])
def directions_kernel(
    x, order, live, start, directions, N, tiles, block, segments, stride_g, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, ITERATIONS: tl.constexpr,
    SMALLEST_NORM: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    end = tl.load(live)
    first = tl.minimum(_edge(segment, segments, tiles, block, N), end)
    size = tl.minimum(_edge(segment + 1, segments, tiles, block, N), end) - first
    i = tl.arange(0, ROWS)
    slots = first + tl.where(size > ROWS, (i.to(tl.int64) * size // ROWS).to(tl.int32), i)
    used = i < size
    columns = tl.arange(0, BLOCK_D)
    wide = columns < HEAD_DIM
    token = tl.load(order + head * N + slots, mask=used, other=0).to(tl.int64)
    where = x + head * stride_g + token[:, None] * stride_n + columns[None, :]
    rows = tl.load(where, mask=used[:, None] & wide[None, :], other=0.0)
    direction = tl.load(start + columns, mask=wide, other=0.0)
    weight = used.to(tl.float32)
    count = tl.maximum(tl.sum(weight, 0), 1.0)
    for _ in range(ITERATIONS):
        along = tl.sum(rows.to(tl.float32) * direction[None, :], 1)
        along = (along - tl.sum(along * weight, 0) / count) * weight
        direction = tl.sum(rows.to(tl.float32) * along[:, None], 0)
        direction /= tl.maximum(tl.sqrt(tl.sum(direction * direction, 0)), SMALLEST_NORM)
    tl.store(directions + (head * segments + segment) * HEAD_DIM + columns, direction, mask=wide)


@triton.jit(do_not_specialize=["segments"])
def project_kernel(
    x, order, live, directions, along, N, tiles, block, segments, stride_g, stride_n,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS: block, or the power of two above."""
    # The programs of all heads of a tile run one after another: at the first level they read whole tokens.
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, ROWS)
    slots = tile * block + i
    inside = (i < block) & (slots < N)
    columns = tl.arange(0, BLOCK_D)
    wide = columns < HEAD_DIM
    segment = tile * segments // tiles
    where = directions + (head * segments + segment) * HEAD_DIM + columns
    direction = tl.load(where, mask=wide, other=0.0)
    token = tl.load(order + head * N + slots, mask=inside, other=0).to(tl.int64)
    where = x + head * stride_g + token[:, None] * stride_n + columns[None, :]
    rows = tl.load(where, mask=inside[:, None] & wide[None, :], other=0.0)
    at = tl.sum(rows.to(tl.float32) * direction[None, :], 1)
    at = tl.where(at == at, tl.minimum(tl.maximum(at, -_LARGEST), _LARGEST), 0.0)
    at = tl.where(slots < tl.load(live), at, float("inf"))
    tl.store(along + head * N + slots, at, mask=inside)


@triton.jit
def _keys(along, slots, end):
    """Coordinates as integers in the same order; after the segment, the largest integer."""
    inside = slots < end
    at = tl.load(along + slots, mask=inside, other=0.0)
    return tl.where(inside, ordered_bits(at), 0xFFFFFFFF)


@triton.jit(do_not_specialize=["segments"])
def partition_kernel(along, order, out, N, tiles, block, segments, TILE: tl.constexpr):
    segment, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    along += head * N
    order += head * N
    out += head * N
    first = _edge(segment, segments, tiles, block, N)
    middle = _edge(2 * segment + 1, 2 * segments, tiles, block, N)
    end = _edge(segment + 1, segments, tiles, block, N)
    half = middle - first
    keys = _keys(along, first + tl.arange(0, TILE), end)
    pivot = tl.zeros([], tl.uint32)
    bit = tl.full([], 1 << 31, tl.uint32)
    less = tl.zeros([], tl.int32)
    for _ in range(32):
        trial = pivot | bit
        counts = (keys < trial).to(tl.int32)
        for at in range(first + TILE, end, TILE):
            counts += (_keys(along, at + tl.arange(0, TILE), end) < trial).to(tl.int32)
        below = tl.sum(counts, 0)
        pivot = tl.where(below < half, trial, pivot)
        less = tl.where(below < half, below, less)
        bit = bit >> 1
    through, ties = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for at in range(first, end, TILE):
        slots = at + tl.arange(0, TILE)
        inside = slots < end
        keys = _keys(along, slots, end)
        tie = ((keys == pivot) & inside).to(tl.int32)
        left = (keys < pivot) | ((tie > 0) & (ties + tl.cumsum(tie, 0) <= half - less))
        left = (left & inside).to(tl.int32)
        so_far = through + tl.cumsum(left, 0)
        place = tl.where(left > 0, first + so_far - 1, middle + slots - first - so_far)
        tl.store(out + place, tl.load(order + slots, mask=inside, other=0), mask=inside)
        ties += tl.sum(tie, 0)
        through += tl.sum(left, 0)


def directions(x: Tensor, order: Tensor, live: Tensor, start: Tensor, block: int, segments: int) -> Tensor:
    """[G,segments,D] float32."""
    G, N, D = x.shape
    x = _readable(x)
    out = torch.empty((G, segments, D), dtype=torch.float32, device=x.device)
    directions_kernel[(segments, G)](
        x, order, live, start, out, N, triton.cdiv(N, block), block, segments,
        *x.stride()[:2], **directions_meta(D, longest(N, block, segments)),
    )  # fmt: skip
    return out


def project(x: Tensor, order: Tensor, live: Tensor, directions: Tensor, block: int) -> Tensor:
    """[G,N] float32."""
    G, N, D = x.shape
    x, tiles = _readable(x), triton.cdiv(N, block)
    along = torch.empty((G, N), dtype=torch.float32, device=x.device)
    project_kernel[(G, tiles)](
        x, order, live, directions, along, N, tiles, block, directions.shape[1], *x.stride()[:2],
        **project_meta(D, block),
    )  # fmt: skip
    return along


def partition(along: Tensor, order: Tensor, block: int, segments: int) -> Tensor:
    """[G,N] int32."""
    G, N = along.shape
    out, options = torch.empty_like(order), partition_meta(longest(N, block, segments))
    partition_kernel[(segments, G)](along, order, out, N, triton.cdiv(N, block), block, segments, **options)
    return out


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def directions_meta(head_dim: int, width: int) -> dict[str, Any]:
    """The kernel's compile-time constants and launch options, for segments of up to `width` slots."""
    rows = min(SAMPLE, max(32, triton.next_power_of_2(width)))
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "ROWS": rows,
        "ITERATIONS": ITERATIONS, "SMALLEST_NORM": SMALLEST_NORM, "num_warps": rows // 16,
        "enable_fp_fusion": True,
    }  # fmt: skip


def project_meta(head_dim: int, block: int) -> dict[str, Any]:
    """project_kernel's."""
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "ROWS": triton.next_power_of_2(block), "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


def partition_meta(width: int) -> dict[str, Any]:
    """partition_kernel's: few sizes, because each is compiled."""
    tile, warps = next((s for s in _PARTITIONS if s[0] >= width), _PARTITIONS[-1])
    return {"TILE": tile, "num_warps": warps, "enable_fp_fusion": True}


# Slots of a tile and warps.
_PARTITIONS = ((512, 1), (2048, 4), (4096, 16))
