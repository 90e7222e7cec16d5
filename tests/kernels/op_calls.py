"""Calls of the ops: inputs, the constants of sites, and a site as one op or as three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from svg_ear_compile.kernels import ops  # noqa: F401 - registers the ops
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.context import Decisions, RunContext, SiteDecision

B, H, D = 2, 2, 16
CONSTANTS = SiteConstants(
    scale=None,
    num_text=0,
    text_first=False,
    grid=[],
    order="splits",
    routing="output_error",
    compensate=True,
    density=0.3,
    seed=0,
    site=3,
)
FAMILIES = [
    ("cubes", "output_error"), ("splits", "output_error"), ("kmeans", "svg_ear"), ("kmeans", "mass"),
]  # fmt: skip


def inputs(length: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [B,H,L,D], in memory [B,L,H,D]."""
    random = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, length, H, D, generator=random).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def sites(length: int, num_text: int = 0, **changes: Any) -> list[SiteConstants]:
    """Constants of every family; cubes get a grid, if the video tokens fill one."""
    grid = {200: [2, 10, 10], 1000: [10, 10, 10]}.get(length - num_text, [1, 1, length - num_text])
    return [
        CONSTANTS._replace(num_text=num_text, order=order, routing=routing, grid=grid, **changes)
        for order, routing in FAMILIES
    ]


def merged(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, c: SiteConstants) -> Tensor:
    return torch.ops.svg_ear.attention(query, key, value, mask, *c)


def three(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, c: SiteConstants) -> Tensor:
    plan = torch.ops.svg_ear.clustered_permute(query, key, value, mask, *c)
    out, lse = torch.ops.svg_ear.sparse_exact(query, key, value, mask, *plan, *c)
    return torch.ops.svg_ear.centroid_compensation(query, out, lse, *plan, *c)


def decided(c: SiteConstants, strict: bool = True, audit: bool = False, **decision: Any) -> RunContext:
    """The context of a call in which the host decided this about the site of these constants."""
    sites = {c.site: SiteDecision(**{"density": c.density, **decision})}
    return RunContext(Decisions(sites, strict=strict, audit=audit))


def lies_by_token(out: Tensor) -> bool:
    """Whether out [B,H,L,D] is [B,L,H,D] in memory."""
    _, heads, length, dim = out.shape
    return out.stride() == (heads * length * dim, dim, heads * dim, 1)
