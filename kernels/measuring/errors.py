"""How far is an output from exact attention? A few query rows of each head tell, computed exactly.

n rows of every head (`count`), one at random in each of n equal stretches: of the query order, so that every query
block is represented; or, where several orders are compared, of the tokens, the same for all orders. The sums below
are unbiased estimates of those over all rows.

    lost_h = sum_rows |o_r - o*_r|^2,   whole_h = sum_rows |o*_r|^2,   error = sqrt(sum_h lost / sum_h whole)

The rows are drawn by a generator of their own from the seed of the call: the same call, the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import first_order
from ..dispatch import kernels_for
from ..plan import SparsePlan

ROWS = 64
"""Rows of each head. Fewer cost the same on a GPU, where reading all keys and values is what takes time."""
CALL_ROWS, SHARE = 2048, 1 / 64
"""With few heads each has more rows: this many in all, but at most this share of a head's rows. Much of an error may
lie in few rows, and what steers the density is the error of the whole call. With 64 rows of two heads one measurement
in a hundred was half the true error or less, one in twenty 27% too low (three tiny models)."""
TRIAL_TIMES = 4
"""A trial has this many times as many rows, because there each head counts for itself.
The logarithm of the ratio of a head's errors in two orders has, on the tiny Wan, a standard deviation of 0.09
to 0.57 with 64 rows, and of 0.04 to 0.34 with 256."""


def count(like: Tensor, trial: bool = False) -> int:
    """How many rows of each head of a call [B,H,L,D] are measured, or tried: a multiple of ROWS."""
    batch, heads, length, _ = like.shape
    many = min(CALL_ROWS // (batch * heads), int(SHARE * length))
    return max(many // ROWS, 1) * ROWS * (TRIAL_TIMES if trial else 1)


def sample(length: int, like: Tensor, seed: int, count: int) -> Tensor:
    """One number of each of n (count, or all) equal stretches of 0 to length - 1: [B,H,n] int64."""
    n = min(count, length)
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
    Where it merges them it writes log-sum-exps 16 at a time, also past their end (memcheck, torch 2.11).
    """
    choice = torch.backends.cuda.SDPAParams(query, key, value, seen, 0.0, False, False)
    whole = query.shape[-1] % 8 == 0 and query[..., 0].numel() % 16 == 0
    if query.is_cuda and whole and torch.backends.cuda.can_use_flash_attention(choice):
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
    """output_error over all rows, exact attention in float32: slower than a dense call.

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


def planned_errors(
    query: Tensor,
    plans: Sequence[SparsePlan],
    exact: Tensor,
    tokens: Tensor,
    scale: float,
    terms: bool = False,
) -> Tensor:
    """(lost, whole) if these plans were used, which differ only in what their routing chose.

    [plans * forms,2,B,H] float32: one form, or two with terms, the second with first-order terms. exact
    [B,H,n,D]: exact attention at tokens [B,H,n].
    """
    order = plans[0].query_order.long()
    slots = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    slots = slots.gather(-1, tokens)
    blocks = torch.searchsorted(plans[0].query_offsets[..., 1:].long(), slots, right=True)
    queries, sums = rows(query, tokens), []
    linear = first_order.linear(queries, blocks, plans, scale) if terms else []
    for i, plan in enumerate(plans):
        out, share = kernels_for(query).rows.planned_rows(queries, blocks, plan, scale)
        sums.append(_sums(out, exact))
        if terms:
            sums.append(_sums(out + share[..., None] * linear[i], exact))
    return torch.stack(sums)


def _sums(out: Tensor, exact: Tensor) -> Tensor:
    exact = exact.float()
    return torch.stack([(out.float() - exact).square().sum((-1, -2)), exact.square().sum((-1, -2))])
