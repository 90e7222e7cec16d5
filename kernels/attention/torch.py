"""Sparse attention with centroid compensation in plain PyTorch: skipped blocks really cost nothing.

Per batch element, head and query block: gather the rows that the block meets (tokens of kept blocks,
centroids of compensated ones), two matrix products and a softmax, all in float32, one rounding at the end.
Offsets and lists are read on the host once per call, so this path is for the CPU. `attend` hands equal tiles to the
kernel in cpp.py where that can be built; for what is computed here `variable` (blocks of any size?) makes no
difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import SparsePlan, Terms
from . import cpp


class _Tile(NamedTuple):
    """One query block of one head."""

    b: int
    h: int
    block: int
    tokens: Tensor  # [m] its queries, in the model's order
    query: Tensor  # [m,D] float32
    slots: Tensor  # [n] rows of its kept key blocks in plan.key
    centroids: Tensor  # [c] key blocks whose bias is not -inf
    bias: Tensor  # [c] float32


def _tiles(query: Tensor, plan: SparsePlan) -> Iterator[_Tile]:
    """The query blocks that hold queries."""
    B, H = query.shape[:2]
    query_offsets, counts = plan.query_offsets.tolist(), plan.kept_count.tolist()
    blocks = torch.arange(plan.bias.shape[-1], device=plan.key_offsets.device)
    for b in range(B):
        for h in range(H):
            block_of_slot = blocks.repeat_interleave(plan.key_offsets[b, h].diff())
            for i, count in enumerate(counts[b][h]):
                first, last = query_offsets[b][h][i : i + 2]
                if first == last:
                    continue
                tokens = plan.query_order[b, h, first:last].long()
                kept = torch.zeros_like(blocks, dtype=torch.bool)
                kept[plan.kept_blocks[b, h, i, :count].long()] = True
                bias = plan.bias[b, h, i]
                centroids = (bias != -torch.inf).nonzero()[:, 0]
                rows = query[b, h].index_select(0, tokens).float()
                slots = kept[block_of_slot].nonzero()[:, 0]
                yield _Tile(b, h, i, tokens, rows, slots, centroids, bias[centroids])


def sparse_exact(
    query: Tensor, plan: SparsePlan, scale: float, out: Tensor, variable: bool = True
) -> tuple[Tensor, Tensor]:
    """Writes the kept blocks' softmax into out [B,H,L,D]; returns (out, lse [B,H,L] float32).

    A query that meets nothing has out 0 and lse -inf.
    """
    lse = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)
    out.zero_()
    for t in _tiles(query, plan):
        if len(t.slots) == 0:
            continue
        keys, values = (x[t.b, t.h].index_select(0, t.slots).float() for x in (plan.key, plan.value))
        logits = torch.mm(t.query, keys.T).mul_(scale)
        lse[t.b, t.h, t.tokens] = logits.logsumexp(dim=-1)
        out[t.b, t.h].index_copy_(0, t.tokens, (logits.softmax(dim=-1) @ values).to(out.dtype))
    return out, lse


def centroid_compensation(
    query: Tensor,
    exact: Tensor,
    lse: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
) -> Tensor:
    """Writes the joint softmax of the exact part and the centroids into out and returns it.

    (e^lse exact + sum_j w_j vc_j) / (e^lse + sum_j w_j), w_j = e^(scale q.kc_j + bias_j)
    """
    out.copy_(exact)
    for t in _tiles(query, plan):
        if len(t.centroids) == 0:
            continue
        keys, values = (x[t.b, t.h, t.centroids].float() for x in (plan.key_centroids, plan.value_centroids))
        logits = torch.addmm(t.bias, t.query, keys.T, alpha=scale)
        skipped, kept = logits.logsumexp(dim=-1), lse[t.b, t.h, t.tokens]
        both = torch.logaddexp(skipped, kept)
        merged = (
            exact[t.b, t.h, t.tokens].float() * (kept - both).exp()[:, None]
            + (logits.softmax(dim=-1) @ values) * (skipped - both).exp()[:, None]
        )
        out[t.b, t.h].index_copy_(0, t.tokens, merged.to(out.dtype))
    return out


def attend(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    out: Tensor,
    variable: bool = True,
    terms: Terms | None = None,
) -> Tensor:
    """Both in one: centroids are further keys of one softmax. Writes into out and returns it.

    variable: False promises at most QUERY_BLOCK queries and KEY_BLOCK keys in a block.
    terms: of first order, kernels/attention/first_order.py.

    A query that meets nothing, token or centroid, has out 0, as in scaled_dot_product_attention.
    """
    if not variable and query.device.type == "cpu" and not cpp.why_not(query.shape[2]):
        return cpp.attend(query, plan, scale, out, terms)
    length, head, tables = plan.key.shape[2], (-1, -1), (query, query)
    places = [] if terms is None else terms.places.tolist()
    for t in _tiles(query, plan):
        if head != (t.b, t.h):  # tokens, then centroids: one gather per tile takes from both
            head = (t.b, t.h)
            tables = (
                torch.cat([plan.key[head], plan.key_centroids[head]]).float(),
                torch.cat([plan.value[head], plan.value_centroids[head]]).float(),
            )
        rows = torch.cat([t.slots, t.centroids + length])
        if len(rows) == 0:
            out[head].index_fill_(0, t.tokens, 0)
            continue
        keys, values = (table.index_select(0, rows) for table in tables)
        bias = torch.cat([t.bias.new_zeros(len(t.slots)), t.bias])
        weights = torch.addmm(bias, t.query, keys.T, alpha=scale).softmax(dim=-1)
        result = weights @ values
        if terms is not None and (place := places[t.h]) >= 0:
            share = weights[:, len(t.slots) :].sum(-1, keepdim=True)
            result += share * (t.query @ terms.matrices[t.b, place, t.block])
        out[head].index_copy_(0, t.tokens, result.to(out.dtype))
    return out
