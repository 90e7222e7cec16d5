"""Sparse attention with centroid compensation in plain PyTorch: skipped blocks really cost nothing."""

from __future__ import annotations

from torch import Tensor

from .plan import Plan


def sparse_exact(query: Tensor, plan: Plan, scale: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the kept blocks' softmax into out [B,H,L,D]; returns (out, lse [B,H,L] float32)."""
    raise NotImplementedError


def centroid_compensation(
    query: Tensor, exact: Tensor, lse: Tensor, plan: Plan, scale: float, out: Tensor
) -> Tensor:
    """Writes the joint softmax of the exact part and the centroids into out and returns it."""
    raise NotImplementedError


def attend(query: Tensor, plan: Plan, scale: float, out: Tensor) -> Tensor:
    """Both in one."""
    raise NotImplementedError
