"""Which blocks are computed exactly? Spends a budget of query-key pairs where the error is largest."""

from __future__ import annotations

from torch import Tensor

from .probe import Scores


def route(
    scores: Scores,
    query_sizes: Tensor,
    key_sizes: Tensor,
    video_query_blocks: int,
    video_key_blocks: int,
    routing: str,
    density: float | None,
) -> Tensor:
    """kept [B,H,Cq,Ck] bool. Text rows and columns are always kept; empty key blocks never."""
    raise NotImplementedError


def centroid_bias(scores: Scores, kept: Tensor, key_sizes: Tensor, routing: str, compensate: bool) -> Tensor:
    """bias [B,H,Cq,Ck] float32 of Plan."""
    raise NotImplementedError


def kept_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """(kept_count [B,H,Cq], kept_blocks [B,H,Cq,Ck]) of Plan, int32, contiguous."""
    raise NotImplementedError


def areas(kept: Tensor, query_sizes: Tensor, key_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(exact, executed) query-key pairs of the kept blocks, 0-d float64; executed counts tile padding."""
    raise NotImplementedError
