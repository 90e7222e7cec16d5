"""Is a sparse call faster than a dense one on this GPU? A measured model of what both cost.

Milliseconds of one attention call over B x H heads of L tokens, with P = B H L^2 D and R = B H L D:

    dense  = 4 P / dense_rate
    sparse = fixed + R row + P pair + density 4 P / exact_rate

row: clustering, permuting and writing, which read every token once. pair: probe, routing and centroids, which
meet every query (or its block) with every key block. fixed: what a call takes however small it is, launches
first of all. The coefficients are fitted to benchmarks/results/attention_h200.json by benchmarks/fit_cost.py,
and a test holds them against it. Of a GPU or head_dim that was not measured nothing is said.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .sizes import example, hint

# Of the video pairs, where the settings name no density: the error budget finds its own.
TYPICAL_DENSITY = 0.25


class Costs(NamedTuple):
    """Coefficients for one GPU and head_dim: rates in FLOP per millisecond, the others in milliseconds."""

    dense_rate: float
    exact_rate: float
    fixed: float
    row: float
    pair: float

    def dense(self, batch: int, heads: int, length: int, head_dim: int) -> float:
        """Milliseconds of a dense call."""
        return 4 * batch * heads * length**2 * head_dim / self.dense_rate

    def sparse(self, batch: int, heads: int, length: int, head_dim: int, density: float) -> float:
        """Milliseconds of a sparse call."""
        rows = batch * heads * length * head_dim
        pairs = rows * length
        return self.fixed + rows * self.row + pairs * self.pair + density * 4 * pairs / self.exact_rate


# By compute capability and head_dim.
MEASURED: dict[tuple[int, int, int], Costs] = {
    (9, 0, 64): Costs(4.025e11, 3.061e11, 1.181, 5.057e-09, 0.0),
    (9, 0, 128): Costs(5.798e11, 6.037e11, 0.5601, 0.0, 3.963e-13),
}


def costs(query: torch.Tensor) -> Costs | None:
    """What is known of calls with such a query [B,H,L,D]; None where nothing was measured."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = torch.cuda.get_device_capability(query.device)
    return MEASURED.get((*capability, hint(query.shape[3]) or 0))


def too_slow(node: torch.fx.Node, density: float | None) -> str:
    """Why a sparse call with the query of this node would not be faster than a dense one; "" if it is."""
    query = example(node)
    known = costs(query)
    sizes = [size for size in map(hint, query.shape) if size is not None]
    if known is None or len(sizes) < query.dim():
        return ""
    density = TYPICAL_DENSITY if density is None else density
    batch, heads, length, head_dim = sizes
    dense = known.dense(batch, heads, length, head_dim)
    sparse = known.sparse(batch, heads, length, head_dim, density)
    if sparse < dense:
        return ""
    return f"{sparse:.2g} ms at density {density:g}, {dense:.2g} dense"
