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

from . import first_order
from .plan import Plan

ROWS = 64
"""Rows of each head. Fewer cost the same on a GPU, where reading all keys and values is what takes time."""
TRIAL_ROWS = 256
"""The same for what a call tries, twice in a generation: much of a head's error may lie in few rows. The
logarithm of the ratio of a head's errors in two orders has, on the tiny Wan, a standard deviation of 0.09 to
0.57 with 64 rows, and of 0.04 to 0.34 with these."""

# Bytes of one [heads, rows, L] float32 temporary.
_CHUNK_BYTES = 2**28


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


def exact_rows(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Exact attention of few queries [B,H,n,D]; key, value and seen as in output_error.

    They are one block of queries a head: of all kernels FlashAttention-2 alone then cuts the keys into parts,
    so that more than H multiprocessors have work (75,600 keys, 8 heads, H200: 0.13 ms instead of 1.06).
    """
    choice = torch.backends.cuda.SDPAParams(query, key, value, seen, 0.0, False, False)
    if query.is_cuda and query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(choice):
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
        return out
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)


def output_error(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, out: Tensor, tokens: Tensor, scale: float
) -> Tensor:
    """(lost, whole) of the output `out` [B,H,L,D] at tokens [B,H,n], [2,B,H] float32.

    key, value [B,H,L,D] in any order; seen [B or 1,1 or H,1,L] bool: which of them there are, None: all.
    """
    return _sums(rows(out, tokens), exact_rows(rows(query, tokens), key, value, seen, scale))


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


def planned_error(
    query: Tensor, plan: Plan, exact: Tensor, tokens: Tensor, scale: float, terms: bool = False
) -> Tensor:
    """(lost, whole) if `plan` were used: [1,2,B,H] float32, with terms [2,2,B,H], the second with first-order
    terms. exact [B,H,n,D]: exact attention at tokens [B,H,n].

    A few heads at a time: what is [n, L] for all heads at once would not fit beside a model.
    """
    order = plan.query_order.long()
    slots = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    slots = slots.gather(-1, tokens).flatten(0, 1)
    queries = rows(query, tokens).flatten(0, 1).float()
    step = max(1, _CHUNK_BYTES // (4 * plan.key.shape[2] * max(1, tokens.shape[-1])))
    planned = []
    for at in range(0, len(queries), step):
        some = slice(at, at + step)
        heads = Plan(*(x.flatten(0, 1)[some] for x in plan))
        planned.append(_planned_rows(queries[some], heads, slots[some], scale, terms))
    outputs = torch.cat(planned, dim=1).unflatten(1, query.shape[:2])  # [forms,B,H,n,D]
    return torch.stack([_sums(out, exact) for out in outputs])


def _planned_rows(query: Tensor, plan: Plan, slots: Tensor, scale: float, terms: bool) -> Tensor:
    """The joint softmax (kernels/plan.py) of the queries [G,n,D] in these slots [G,n] of G heads, float32:
    [1,G,n,D], with terms [2,G,n,D]. plan: of these heads, without the batch."""
    G, length, _ = plan.key.shape
    blocks = plan.bias.shape[-1]
    row = torch.searchsorted(plan.query_offsets[:, 1:].long(), slots, right=True)

    def of_rows(x: Tensor) -> Tensor:
        return torch.take_along_dim(x, row[..., None], dim=1)

    listed = torch.arange(blocks, device=query.device) < of_rows(plan.kept_count[..., None])
    # One column more takes what is not listed: those places are unspecified.
    kept = torch.zeros(*slots.shape, blocks + 1, dtype=torch.bool, device=query.device)
    kept.scatter_(2, torch.where(listed, of_rows(plan.kept_blocks).long(), blocks), True)
    kept[..., blocks] = False
    token = torch.arange(length, device=query.device).expand(G, -1).contiguous()
    block_of_token = torch.searchsorted(plan.key_offsets[:, 1:].long(), token, right=True)
    skipped = ~kept.gather(2, block_of_token[:, None].expand(-1, slots.shape[1], -1))

    tokens = (scale * query @ plan.key.float().mT).masked_fill_(skipped, -torch.inf)
    centroids = scale * query @ plan.key_centroids.float().mT + of_rows(plan.bias)
    top = torch.maximum(tokens.amax(-1, keepdim=True), centroids.amax(-1, keepdim=True))
    top.masked_fill_(top == -torch.inf, 0)
    tokens, centroids = tokens.sub_(top).exp_(), centroids.sub_(top).exp_()
    mass = centroids.sum(-1, keepdim=True)
    total = (tokens.sum(-1, keepdim=True) + mass).clamp_(min=torch.finfo(torch.float32).tiny)
    out = (tokens @ plan.value.float() + centroids @ plan.value_centroids.float()) / total
    if not terms:
        return out[None]
    del tokens, skipped
    every = torch.arange(G, device=query.device)
    matrices = first_order.matrices(Plan(*(x[None] for x in plan)), scale, every)[0]
    matrices = matrices[every[:, None], row].float()  # [G,n,D,D]
    return torch.stack([out, out + mass / total * (query[..., None, :] @ matrices)[..., 0, :]])


def _sums(out: Tensor, exact: Tensor) -> Tensor:
    exact = exact.float()
    return torch.stack([(out.float() - exact).square().sum((-1, -2)), exact.square().sum((-1, -2))])
