"""Row budgets: which blocks do the papers compute exactly? Each row of query blocks has a budget in keys.

"svg_ear" (arXiv 2603.08982): with a density every row has the same budget, density times the video keys of its
head ("greedily selected under a fixed density budget", the paper's page); without one, what centroid top-p 0.9
would keep (the released code). The 5% of key blocks with the largest centroid mass go first and in any case, then
the others by error until the budget is spent. So a row exceeds its budget by less than its last block, or where the
5% alone are more.

"mass" (SVG2, arXiv 2505.18875): as "svg_ear" with the centroid mass for the error, so the 5% are nothing special:
without a density just the blocks of top-p 0.9.

Areas and probabilities are summed as integers: exactly, and in any order with the same result.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP_P = 0.9
FLOOR_PERCENT = 5
# Probabilities are summed as integers of this unit.
_UNIT = 2.0**40


def chosen(
    error: Tensor, mass: Tensor, cost: Tensor, columns: Tensor, routing: str, density: float | None
) -> Tensor:
    """Which of the pairs of video blocks are computed exactly, [B,H,Cq,Ck] bool.

    error, mass [B,H,Cq,Ck] float32 (kernels/probe/torch.py), -inf for empty key blocks. cost, broadcast to the same
    shape: the keys that a block takes from its row's budget. columns [B,H,Ck]: the keys of each block.
    """
    if routing not in ("svg_ear", "mass"):
        raise ValueError(f"unknown routing {routing!r}")
    filled = (columns > 0).sum(-1)[..., None, None]
    floor = -(-filled * (FLOOR_PERCENT if routing == "svg_ear" else 0) // 100)
    score = _floor_first(error, mass, floor) if routing == "svg_ear" else mass
    if density is None:
        budget = torch.where(_top_p(mass), cost, 0).sum(-1)
    else:
        budget = (columns.sum(-1, keepdim=True).double() * density).ceil().long()
    return _row_budgets(score, cost, budget, floor)


def _top_p(mass: Tensor) -> Tensor:
    """The smallest set of blocks per row whose share of the centroid mass is at least TOP_P: bool."""
    share, rank = mass.softmax(-1).nan_to_num(0).sort(dim=-1, descending=True, stable=True)
    share = (share.double() * _UNIT).long()
    chosen = share.cumsum(-1) - share < int(TOP_P * _UNIT)
    return torch.empty_like(chosen).scatter_(-1, rank, chosen)


def _floor_first(error: Tensor, mass: Tensor, floor: Tensor) -> Tensor:
    """The error, infinite for the `floor` [B,H,1,1] blocks of each row with the largest mass."""
    rank = mass.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(mass.shape[-1], device=mass.device).expand_as(rank)
    always = torch.empty_like(rank).scatter_(-1, rank, place) < floor
    return torch.where(always, torch.inf, error.clamp(max=torch.finfo(error.dtype).max))


def _row_budgets(score: Tensor, cost: Tensor, budget: Tensor, floor: Tensor) -> Tensor:
    """Row by row blocks by score until the keys of budget [B,H,Cq or 1] are spent, and the first `floor`
    [B,H,1,1] in any case; bool."""
    rank = score.argsort(dim=-1, descending=True, stable=True)
    spent = cost.gather(-1, rank).cumsum(-1, dtype=torch.int32)
    before = torch.nn.functional.pad(spent[..., :-1], (1, 0))
    place = torch.arange(cost.shape[-1], device=cost.device)
    chosen = (before < budget[..., None]) | (place < floor)
    return torch.empty_like(chosen).scatter_(-1, rank, chosen)
