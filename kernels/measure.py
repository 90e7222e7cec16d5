"""How far is an output from exact attention? A few query rows of each head tell, computed exactly.

n rows of every head, one at random in each of n equal stretches: of the query order, so that all query blocks
have their say, or where several orders are compared of the tokens, the same for all. The sums below estimate
those over all rows without a bias.

    lost_h = sum_rows |o_r - o*_r|^2,   whole_h = sum_rows |o*_r|^2,   error = sqrt(sum_h lost / sum_h whole)

The rows are drawn by a generator of their own from the seed of the call: the same call, the same rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .plan import Plan

ROWS = 64
"""Rows of each head. Fewer cost the same on a GPU, where reading all keys and values is what takes time."""
TRIAL_ROWS = 256
"""The same for what a dense call tries, once in a generation: much of a head's error may lie in few rows. The
logarithm of the ratio of a head's errors in two orders has, on the tiny Wan, a standard deviation of 0.09 to
0.57 with 64 rows, and of 0.04 to 0.34 with these."""


def sample(length: int, like: Tensor, seed: int, count: int | None = None) -> Tensor:
    """One number of each of n (count or ROWS) equal stretches of 0 to length - 1: [B,H,n] int64."""
    n = min(ROWS if count is None else count, length)
    ends = torch.arange(n + 1, device=like.device) * length // n
    generator = torch.Generator(like.device).manual_seed(seed)
    random = torch.randint(2**31, (*like.shape[:2], n), generator=generator, device=like.device)
    return ends[:-1] + random % ends.diff()


def rows(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B,H,L,D] at tokens [B,H,n]: [B,H,n,D]."""
    return torch.take_along_dim(x, tokens[..., None], dim=2)


def output_error(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, out: Tensor, tokens: Tensor, scale: float
) -> Tensor:
    """(lost, whole) of the output `out` [B,H,L,D] at tokens [B,H,n], [2,B,H] float32.

    key, value [B,H,L,D] in any order; seen [B or 1,1 or H,1,L] bool: which of them there are, None: all.
    """
    exact = F.scaled_dot_product_attention(rows(query, tokens), key, value, attn_mask=seen, scale=scale)
    return _sums(rows(out, tokens), exact)


def true_error(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, out: Tensor, scale: float
) -> Tensor:
    """output_error over all rows, exact attention in float32: as slow as a dense call, and slower.

    One head at a time: float32 copies of all of them would not fit beside a model.
    """
    B, H, L, _ = query.shape
    seen = None if seen is None else seen.expand(B, H, 1, L)
    heads = []
    for h in range(H):
        q, k, v, o = (x[:, h : h + 1].float() for x in (query, key, value, out))
        mask = None if seen is None else seen[:, h : h + 1]
        heads.append(_sums(o, F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)))
    return torch.cat(heads, dim=-1)


def planned_error(query: Tensor, plan: Plan, out: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """(lost, whole) [2,B,H] float32 if `plan` were used where `out` [B,H,L,D] is exact. tokens [B,H,n].

    One head at a time: what is [n, L] for all heads at once would not fit beside a model.
    """
    order = plan.query_order.long()
    slots = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    slots = slots.gather(-1, tokens)
    queries, planned = rows(query, tokens).float(), []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            head = Plan(*(x[b, h] for x in plan))
            planned += [_planned_rows(queries[b, h], head, slots[b, h], scale)]
    return _sums(torch.stack(planned).view(queries.shape), rows(out, tokens))


def _planned_rows(query: Tensor, plan: Plan, slots: Tensor, scale: float) -> Tensor:
    """One head's joint softmax (kernels/plan.py) of the queries [n,D] in these slots [n], float32."""
    length, blocks = plan.key.shape[0], plan.bias.shape[-1]
    row = torch.searchsorted(plan.query_offsets[1:].long(), slots, right=True)
    place = torch.arange(blocks, device=query.device)
    listed = place < plan.kept_count[row, None]
    # One column more takes what is not listed: those places are unspecified.
    kept = torch.zeros(len(slots), blocks + 1, dtype=torch.bool, device=query.device)
    kept.scatter_(1, torch.where(listed, plan.kept_blocks[row].long(), blocks), True)
    kept[:, blocks] = False
    token = torch.arange(length, device=query.device)
    block_of_token = torch.searchsorted(plan.key_offsets[1:].long(), token, right=True)
    tokens = (scale * query @ plan.key.float().mT).masked_fill_(~kept[:, block_of_token], -torch.inf)
    centroids = scale * query @ plan.key_centroids.float().mT + plan.bias[row]
    weights = torch.cat([tokens, centroids], dim=-1).softmax(dim=-1)
    return weights @ torch.cat([plan.value, plan.value_centroids]).float()


def _sums(out: Tensor, exact: Tensor) -> Tensor:
    exact = exact.float()
    return torch.stack([(out.float() - exact).square().sum((-1, -2)), exact.square().sum((-1, -2))])
