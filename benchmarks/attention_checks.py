"""How far is the output of a sparse attention call from its plan's joint softmax, and from dense attention?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svg_ear_compile.kernels.plan import SparsePlan, term_blocks

# The joint softmax in float32 over the plan's own low-precision tensors: what is left is rounding.
CHECK_ROW, CHECK_ALL = 0.03, 0.008


def error_to_plan(
    out: Tensor,
    query: Tensor,
    plan: SparsePlan,
    scale: float,
    heads: list[int],
    first_order: Sequence[bool] = (),
) -> tuple[float, float]:
    """(worst row, all) relative error against the plan's joint softmax, 32 queries of each of these heads.

    first_order: which heads have the terms of kernels/attention/first_order.py: they are added up token by token.
    """
    difference = norm = worst = 0.0
    L, Ck = query.shape[2], plan.bias.shape[-1]
    random = torch.Generator(query.device).manual_seed(1)
    for head in heads:
        slots = torch.randint(L, (32,), device=query.device, generator=random)
        tokens = plan.query_order[0, head, slots].long()
        blocks = torch.searchsorted(plan.query_offsets[0, head].long(), slots, right=True) - 1
        listed = torch.arange(Ck, device=query.device) < plan.kept_count[0, head, blocks, None]
        kept = torch.zeros(32, Ck + 1, device=query.device, dtype=torch.bool)
        places = plan.kept_blocks[0, head, blocks].long().clamp(min=0).masked_fill(~listed, Ck)
        kept.scatter_(1, places, True)
        kept[:, Ck] = False  # also what masked keys, behind the last block, map to
        key_slots = torch.arange(L, device=query.device)
        owner = torch.searchsorted(plan.key_offsets[0, head].long(), key_slots, right=True) - 1
        q = query[0, head, tokens].float()
        logits = torch.cat(
            [
                (q @ plan.key[0, head].float().T * scale).masked_fill(~kept[:, owner], -math.inf),
                q @ plan.key_centroids[0, head].float().T * scale + plan.bias[0, head, blocks],
            ],
            1,
        )
        values = torch.cat([plan.value[0, head], plan.value_centroids[0, head]]).float()
        weights = logits.softmax(1)
        expected = weights @ values
        if first_order and first_order[head]:
            skipped = weights[:, L:].sum(1, keepdim=True)
            expected += skipped * _linear(q, plan, scale, head, blocks, owner)
        error, size = (out[0, head, tokens].float() - expected).norm(dim=1), expected.norm(dim=1)
        worst = max(worst, (error / size).max().item())
        difference, norm = difference + error.square().sum().item(), norm + size.square().sum().item()
    return worst, math.sqrt(difference / norm)


def _linear(q: Tensor, plan: SparsePlan, scale: float, head: int, blocks: Tensor, owner: Tensor) -> Tensor:
    """q_r^T M_g = scale sum_j p_gj / n_j sum_{t in j} q_r.(k_t - kc_j) (v_t - vc_j), g: the group of the row's block,
    p_gj: the mean of its blocks that skip something."""
    centers, value_centers = (x[0, head].float() for x in (plan.key_centroids, plan.value_centroids))
    logits = plan.query_centroids[0, head].float() @ centers.T * scale + plan.bias[0, head]
    of_group = term_blocks(len(logits))
    skips = (plan.bias[0, head] > -math.inf).any(1)
    sizes = plan.key_offsets[0, head].diff().clamp(min=1)
    groups = [
        group[some].softmax(1).sum(0) / some.sum().clamp(min=1)
        for group, some in zip(logits.split(of_group), skips.split(of_group), strict=True)
    ]
    shares = torch.stack(groups)[blocks // of_group] / sizes
    there = owner < len(sizes)
    owner = owner[there]
    keys = plan.key[0, head, there].float() - centers[owner]
    values = plan.value[0, head, there].float() - value_centers[owner]
    return scale * (shares[:, owner] * (q @ keys.T)) @ values


def error_to_dense(
    out: Tensor, inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, rows: int = 256
) -> float:
    """Relative error against dense attention on some queries of every head."""
    query, key, value = inputs
    sample = torch.linspace(0, query.shape[2] - 1, rows, device=query.device).long()
    dense = F.scaled_dot_product_attention(query[:, :, sample], key, value, attn_mask=mask).float()
    return ((out[:, :, sample].float() - dense).norm() / dense.norm()).item()
