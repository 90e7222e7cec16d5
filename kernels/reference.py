"""What the kernels must compute, written like the formulas in docs/DESIGN.md.

Plain PyTorch over whole [L, L] score matrices, in float64 by default; shares no code with
the kernels. With dtype=torch.bfloat16 (or another) the same formulas give the error that the low precision alone
causes: a kernel's may be at most twice as large (the rule of FlashAttention's tests).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import SparsePlan, term_blocks


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """softmax(query key^T scale) value; mask [B or 1,1,1,L] bool, True where a key may be seen."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = query.to(dtype) @ key.to(dtype).mT * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
        value = value.masked_fill(~mask.mT, 0)  # NaN in a hidden value must not matter
    return _softmax(logits) @ value.to(dtype)


def joint_softmax(
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    dtype: torch.dtype = torch.float64,
    first_order: Sequence[bool] = (),
) -> Tensor:
    """One softmax over the tokens of kept blocks and the centroids with their biases, [B,H,L,D].

    softmax([scale q.k_t (t kept) ; scale q.kc_j + bias_ij]) [v ; vc]

    first_order [H]: heads to whose output M_g^T q is added, times the centroids' share of the softmax.
    """
    tokens = _token_logits(query, plan, scale, dtype)
    bias = _rows_of_queries(plan.bias, plan)  # [B,H,L,Ck]
    centroids = query.to(dtype) @ plan.key_centroids.to(dtype).mT * scale + bias.to(dtype)
    centroids = centroids.masked_fill(bias == -torch.inf, -torch.inf)
    probabilities = _softmax(torch.cat([tokens, centroids], dim=-1))
    out = probabilities @ torch.cat([plan.value, plan.value_centroids], dim=2).to(dtype)
    if any(first_order):
        share = probabilities[..., tokens.shape[-1] :].sum(-1, keepdim=True)
        matrices, group = first_order_matrices(plan, scale, dtype), term_blocks(plan.bias.shape[2])
        for b, h, i in itertools.product(*map(range, plan.kept_count.shape)):
            if not first_order[h]:
                continue
            first, last = plan.query_offsets[b, h, i : i + 2]
            rows = plan.query_order[b, h, first:last].long()
            out[b, h, rows] += share[b, h, rows] * (query[b, h, rows].to(dtype) @ matrices[b, h, i // group])
    return out


def first_order_matrices(plan: SparsePlan, scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """M_g = scale mean_i sum_j p_ij C_j of every head (kernels/attention/first_order.py), [B,H,groups,D,D]."""
    key, value, key_centroids, value_centroids, query_centroids = (
        x.to(dtype)
        for x in (plan.key, plan.value, plan.key_centroids, plan.value_centroids, plan.query_centroids)
    )
    covariances = torch.zeros(*key_centroids.shape, key.shape[-1], dtype=dtype, device=key.device)
    for b, h, j in itertools.product(*map(range, key_centroids.shape[:3])):
        first, last = plan.key_offsets[b, h, j : j + 2]
        if first < last:
            keys = key[b, h, first:last] - key_centroids[b, h, j]
            values = value[b, h, first:last] - value_centroids[b, h, j]
            covariances[b, h, j] = keys.mT @ values / (last - first)
    shares = _softmax(scale * query_centroids @ key_centroids.mT + plan.bias.to(dtype))
    matrices = []
    for group in shares.split(term_blocks(shares.shape[2]), dim=2):
        skips = (group.sum(-1) > 0).sum(-1).clamp(min=1)  # query blocks that leave something out
        mean = group.sum(2) / skips[..., None]
        matrices.append(scale * torch.einsum("bhj,bhjde->bhde", mean, covariances))
    return torch.stack(matrices, dim=2)


def exact_part(
    query: Tensor, plan: SparsePlan, scale: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """The kept blocks alone: (out [B,H,L,D], lse [B,H,L]); 0 and -inf where nothing is kept."""
    logits = _token_logits(query, plan, scale, dtype)
    return _softmax(logits) @ plan.value.to(dtype), logits.logsumexp(dim=-1)


def remade(plan: SparsePlan, key: Tensor, value: Tensor) -> SparsePlan:
    """The plan with keys, values and centroids taken anew, in float64, from the model's own key and value.

    joint_softmax of it shows a wrong gather or a wrong mean, which the plan's own tensors would hide.
    """
    seen = torch.arange(key.shape[2], device=key.device) < plan.key_offsets[..., -1:]
    order = plan.key_order.long()[..., None]
    key_p, value_p = (torch.take_along_dim(x.double(), order, dim=2) for x in (key, value))
    key_p, value_p = (torch.where(seen[..., None], x, 0.0) for x in (key_p, value_p))
    members = _members(plan.key_offsets, key.shape[2])  # [B,H,Ck,L]
    share = members / members.sum(-1, keepdim=True).clamp(min=1)
    return plan._replace(
        key=key_p, value=value_p, key_centroids=share @ key_p, value_centroids=share @ value_p
    )


def kept_matrix(plan: SparsePlan) -> Tensor:
    """[B,H,Cq,Ck] bool: which key blocks each query block meets exactly."""
    place = torch.arange(plan.kept_blocks.shape[-1], device=plan.kept_blocks.device)
    listed = place < plan.kept_count[..., None]
    kept = torch.zeros_like(listed, dtype=torch.int64)
    kept.scatter_add_(-1, plan.kept_blocks.long().clamp(min=0), listed.long())
    return kept > 0


def _members(offsets: Tensor, length: int) -> Tensor:
    """[B,H,C,L] float64: 1 where the slot belongs to the block."""
    slots = torch.arange(length, device=offsets.device)
    return ((slots >= offsets[..., :-1, None]) & (slots < offsets[..., 1:, None])).double()


def _rows_of_queries(per_block: Tensor, plan: SparsePlan) -> Tensor:
    """[B,H,Cq,X] -> [B,H,L,X]: the row of each query token's block, in token order."""
    block_of_slot = _members(plan.query_offsets, plan.query_order.shape[2]).argmax(dim=2)  # [B,H,L]
    block_of_token = torch.empty_like(block_of_slot).scatter_(2, plan.query_order.long(), block_of_slot)
    return torch.take_along_dim(per_block, block_of_token[..., None], dim=2)


def _token_logits(query: Tensor, plan: SparsePlan, scale: float, dtype: torch.dtype) -> Tensor:
    """[B,H,L,L]: queries in token order, keys in slot order; -inf where the key's block is not kept."""
    slot_kept = kept_matrix(plan).double() @ _members(plan.key_offsets, plan.key.shape[2])  # [B,H,Cq,L]
    logits = query.to(dtype) @ plan.key.to(dtype).mT * scale
    return logits.masked_fill(_rows_of_queries(slot_kept, plan) == 0, -torch.inf)


def _softmax(logits: Tensor) -> Tensor:
    """softmax over the last axis; a row of nothing but -inf gives 0, as scaled_dot_product_attention does."""
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    return logits.masked_fill(empty, 0).softmax(dim=-1).masked_fill(empty, 0)
