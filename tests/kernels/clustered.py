"""Tokens that form clusters, and how well an order keeps them together."""

from __future__ import annotations

import torch
from torch import Tensor


def tokens(*shape: int, seed: int = 0, clusters: int = 11) -> Tensor:
    """Clustered tokens [B,H,L,D] of unequal variances, as keys after their norm are."""
    g = torch.Generator().manual_seed(seed)
    B, H, L, D = shape
    centers = torch.randn(B, H, clusters, D, generator=g)
    label = torch.randint(0, clusters, (B, H, L, 1), generator=g).expand(shape)
    return (centers.gather(2, label) + 0.5 * torch.randn(shape, generator=g)) * torch.linspace(1.5, 0.3, D)


def radius(x: Tensor, size: int) -> float:
    """Root mean squared distance of tokens [..., N, D] from the mean of their block, whole blocks only."""
    x = x[..., : x.shape[-2] // size * size, :].unflatten(-2, (-1, size))
    return (x - x.mean(-2, keepdim=True)).square().sum(-1).mean().sqrt().item()


def is_permutation(order: Tensor) -> bool:
    """Does each row of order [..., N] hold every token once?"""
    return bool((order.sort(-1).values == torch.arange(order.shape[-1], device=order.device)).all())
