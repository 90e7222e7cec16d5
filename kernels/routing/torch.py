"""Routing in plain PyTorch: sorts the scores of kernels/probe, as kernels/routing/__init__.py says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..papers import budgets
from ..plan import KEY_BLOCK, QUERY_BLOCK
from ..probe.torch import Scores

# Errors are compared in steps of 1/512 nat, 0.1% of a norm, from e^-96 to e^32: 16 bits.
LEAST_ERROR, STEPS, MOST_CODE = -96.0, 512.0, 65534


class Routed(NamedTuple):
    """What the routing puts into a SparsePlan (bias, kept_count, kept_blocks), and the areas of what it kept.

    areas: [2] int64, exact and executed query-key pairs of video tokens; executed counts the tiles' padding.
    """

    bias: Tensor
    kept_count: Tensor
    kept_blocks: Tensor
    areas: Tensor


def select(
    scores: Scores,
    query_offsets: Tensor,
    key_offsets: Tensor,
    video: tuple[int, int],
    routing: str,
    density: float | None,
    compensate: bool,
) -> Routed:
    """Chooses the exact blocks and lists them. Offsets as in SparsePlan; video: (query, key) blocks of video."""
    query_sizes, key_sizes = query_offsets.diff(dim=-1), key_offsets.diff(dim=-1)
    kept = route(scores, query_sizes, key_sizes, *video, routing, density)
    bias = centroid_bias(scores, kept, key_sizes, routing, compensate)
    rows, columns = video
    area = areas(kept[:, :, :rows, :columns], query_sizes[..., :rows], key_sizes[..., :columns])
    return Routed(bias, *kept_lists(kept), area)


def route(
    scores: Scores,
    query_sizes: Tensor,
    key_sizes: Tensor,
    video_query_blocks: int,
    video_key_blocks: int,
    routing: str,
    density: float | None,
) -> Tensor:
    """kept [B,H,Cq,Ck] bool. Text rows and columns are always kept; empty key blocks never.

    query_sizes [B,H,Cq], key_sizes [B,H,Ck]: tokens per block. density: exact video query-key pairs over all
    of them; None, for the papers' routings alone: what top-p 0.9 would keep.
    """
    video = (slice(None), slice(None), slice(video_query_blocks), slice(video_key_blocks))
    rows, columns = query_sizes[:, :, :video_query_blocks].long(), key_sizes[:, :, :video_key_blocks]
    error, mass = scores.error[video], scores.mass[video]
    unknown = error.isnan()
    # What a block costs its row: 0 where it is empty, or unknown and kept anyway.
    cost = columns[:, :, None].masked_fill(unknown, 0)
    error = error.masked_fill(unknown | (columns == 0)[:, :, None], -torch.inf)
    mass = mass.masked_fill(unknown, -torch.inf)

    if routing == "output_error":
        assert density is not None, "only the papers' budgets find one"
        pairs = (rows.sum(-1) * columns.sum(-1)).sum(-1)
        chosen = _one_budget(error, cost, rows, (pairs.double() * density).long())
    else:
        chosen = budgets.chosen(error, mass, cost, columns, routing, density)

    kept = (key_sizes > 0)[:, :, None].expand(scores.error.shape).clone()
    kept[video] &= (chosen | unknown) & (rows > 0)[..., None]
    return kept


def codes(error: Tensor) -> Tensor:
    """Errors as integers 0 to MOST_CODE of nearly the same order: what rounds to one step is equal."""
    return ((error - LEAST_ERROR) * STEPS).clamp(0, MOST_CODE).int()


def _one_budget(error: Tensor, cost: Tensor, rows: Tensor, budget: Tensor) -> Tensor:
    """The largest errors of each batch element while their areas fit into budget [B] int64; bool."""
    rank = codes(error).flatten(1).argsort(dim=-1, descending=True, stable=True)
    spent = (cost * rows[..., None]).flatten(1).gather(-1, rank).cumsum(-1)
    fits = spent <= budget[:, None]
    return torch.empty_like(fits).scatter_(-1, rank, fits).view(error.shape)


def centroid_bias(scores: Scores, kept: Tensor, key_sizes: Tensor, routing: str, compensate: bool) -> Tensor:
    """bias [B,H,Cq,Ck] float32 of SparsePlan for skipped blocks: log n_j, plus the Jensen gap ("output_error")."""
    if not compensate:
        return torch.full_like(scores.gap, -torch.inf)
    bias = key_sizes.float().log()[:, :, None]
    if routing == "output_error":
        bias = bias + scores.gap
    # log 0 = -inf: an empty block has no say either way.
    return torch.where(kept, -torch.inf, bias.expand(kept.shape))


def kept_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """(kept_count [B,H,Cq], kept_blocks [B,H,Cq,Ck]) of SparsePlan, int32, contiguous."""
    blocks = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)
    return kept.sum(-1, dtype=torch.int32), blocks.to(torch.int32)


def areas(kept: Tensor, query_sizes: Tensor, key_sizes: Tensor) -> Tensor:
    """(exact, executed) query-key pairs of the kept blocks, [2] int64; executed counts tile padding."""

    def area(queries: Tensor, keys: Tensor) -> Tensor:
        return (torch.where(kept, keys.int()[:, :, None], 0).sum(-1) * queries).sum()

    def padded(sizes: Tensor, tile: int) -> Tensor:
        return (sizes + tile - 1) // tile * tile

    exact = area(query_sizes, key_sizes)
    return torch.stack([exact, area(padded(query_sizes, QUERY_BLOCK), padded(key_sizes, KEY_BLOCK))])
