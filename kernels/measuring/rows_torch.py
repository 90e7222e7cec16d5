"""What does a plan give a few queries of each head?

A trial asks this of plans that compute no output. The queries of a head lie in any blocks; for each the joint softmax
of kernels/plan.py, and the centroids' share of it:

    share(q) = sum_j exp(s(q,kc_j) + bias_ij) / den(q)

Both are 0 for a query without any kept key or centroid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import SparsePlan

# Bytes of one [heads, queries, L] float32 temporary.
_CHUNK_BYTES = 2**28


def planned_rows(query: Tensor, blocks: Tensor, plan: SparsePlan, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B,H,n,D], share [B,H,n]), float32, of queries [B,H,n,D] in the query blocks [B,H,n] int64.

    A few heads at a time: matrices [n, L] for all heads at once would not fit beside a model.
    """
    B, H, n, _ = query.shape
    bias = torch.take_along_dim(plan.bias, blocks[..., None], dim=2)
    tensors = (
        query, kept_of(blocks, plan), bias, plan.key, plan.value, plan.key_offsets, plan.key_centroids,
        plan.value_centroids,
    )  # fmt: skip
    step = max(1, _CHUNK_BYTES // (4 * plan.key.shape[2] * max(1, n)))
    flat = [x.flatten(0, 1) for x in tensors]
    found = [_rows_of_heads(*(x[at : at + step] for x in flat), scale=scale) for at in range(0, B * H, step)]
    out, share = (torch.cat(x).unflatten(0, (B, H)) for x in zip(*found, strict=True))
    return out, share


def kept_of(blocks: Tensor, plan: SparsePlan) -> Tensor:
    """Which key blocks the query blocks [B,H,n] meet exactly: [B,H,n,Ck] bool."""
    Ck = plan.kept_blocks.shape[-1]
    listed = torch.arange(Ck, device=blocks.device) < plan.kept_count.gather(-1, blocks)[..., None]
    # One column more takes what is not listed: those places are unspecified.
    index = torch.take_along_dim(plan.kept_blocks, blocks[..., None], dim=2).where(listed, Ck)
    kept = torch.zeros(*blocks.shape, Ck + 1, dtype=torch.bool, device=blocks.device)
    return kept.scatter_(-1, index.long(), True)[..., :Ck]


def _rows_of_heads(
    query: Tensor, kept: Tensor, bias: Tensor, key: Tensor, value: Tensor, key_offsets: Tensor,
    key_centroids: Tensor, value_centroids: Tensor, *, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """planned_rows of G heads, without the batch; kept and bias [G,n,Ck] are the queries' own."""
    G, length, _ = key.shape
    token = torch.arange(length, device=key.device).expand(G, -1).contiguous()
    block = torch.searchsorted(key_offsets[:, 1:].long(), token, right=True)
    hidden = block == kept.shape[-1]
    block = block.clamp_(max=kept.shape[-1] - 1)[:, None].expand(-1, kept.shape[1], -1)
    skipped = ~kept.gather(2, block) | hidden[:, None]
    value = value.float().masked_fill(hidden[..., None], 0)  # NaN there must not matter

    query = scale * query.float()
    tokens = (query @ key.float().mT).masked_fill_(skipped, -torch.inf)
    centroids = query @ key_centroids.float().mT + bias
    top = torch.maximum(tokens.amax(-1, keepdim=True), centroids.amax(-1, keepdim=True))
    top.masked_fill_(top == -torch.inf, 0)
    tokens, centroids = tokens.sub_(top).exp_(), centroids.sub_(top).exp_()
    mass = centroids.sum(-1, keepdim=True)
    total = (tokens.sum(-1, keepdim=True) + mass).clamp_(min=torch.finfo(torch.float32).tiny)
    out = (tokens @ value + centroids @ value_centroids.float()) / total
    return out, (mass / total)[..., 0]
