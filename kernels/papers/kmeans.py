"""The paper's clusters: Euclidean k-means per head, carried on from step to step.

arXiv 2603.08982 and 2505.18875: queries and keys after their norms and rotary embedding are clustered
separately, with 50 iterations at first and 2 per step from the last step's centroids; an empty cluster keeps
its centroid. One iteration (kernels/papers/kmeans_torch.py):

    label_t = argmin_c |x_t - m_c|^2 = argmin_c (|m_c|^2 / 2 - x_t . m_c),  the lowest index wins ties
    m_c = mean of {x_t : label_t = c}
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import kernels_for

FIRST_ITERATIONS = 50
NEXT_ITERATIONS = 2
# Bytes of working memory for the heads that are clustered at a time.
_CHUNK_BYTES = 2**28


def kmeans(
    x: Tensor, valid: Tensor | None, clusters: int, carried: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters x [B,H,N,D]: (order [B,H,N], offsets [B,H,clusters+1], centroids [B,H,clusters,D] float32).

    Order and offsets are int64. Tokens that are not valid ([B,N] bool) take no part and come last in the
    order, after the last offset. Carried centroids of another shape or device are dropped.
    """
    B, H, N, D = x.shape
    shape = (B, H, clusters, D)
    if carried is not None and (carried.shape != shape or carried.device != x.device):
        carried = None
    order = torch.empty((B, H, N), dtype=torch.int64, device=x.device)
    offsets = torch.empty((B, H, clusters + 1), dtype=torch.int64, device=x.device)
    centroids = torch.empty(shape, dtype=torch.float32, device=x.device)
    steps = kernels_for(x).kmeans
    step = max(1, _CHUNK_BYTES // (N * steps.bytes_per_token(D, clusters)))
    first = _first_tokens(valid, N, clusters, seed, x.device).expand(B, -1) if carried is None else None
    for b in range(B):
        seen = None if valid is None else valid[b]
        for h in range(0, H, step):
            part = (b, slice(h, h + step))
            if first is not None:
                start, iterations = x[part].index_select(1, first[b]), FIRST_ITERATIONS
            else:
                assert carried is not None
                start, iterations = carried[part], NEXT_ITERATIONS
            # A NaN of one token or step must not stay in the clusters for ever.
            means = torch.nan_to_num(start.float())
            for _ in range(iterations):
                labels = steps.assign(x[part], seen, means)
                order[part], offsets[part] = _by_label(labels, clusters)
                means = steps.means(x[part], order[part], offsets[part], means)
            centroids[part] = means
    return order, offsets, centroids


def _first_tokens(valid: Tensor | None, n: int, clusters: int, seed: int, device: torch.device) -> Tensor:
    """Distinct valid tokens to start from [1 or B, clusters]; with fewer valid ones they repeat.

    In the order of a 32-bit hash of their number and the seed: the same on every device, and nothing is
    copied from the host, which a CUDA graph could not record.
    """
    bits = 2**32 - 1
    hashed = torch.arange(n, device=device) + (seed * 0x9E3779B9 & bits)
    for _ in range(2):
        hashed = (hashed ^ (hashed >> 16)) * 0x45D9F3B & bits
    drawn = (hashed ^ (hashed >> 16)).argsort(stable=True)
    slots = torch.arange(clusters, device=device)
    if valid is None:
        return drawn[slots % n][None]
    seen = valid[:, drawn]
    drawn = drawn[(~seen).to(torch.uint8).argsort(dim=-1, stable=True)]
    return drawn.gather(-1, slots % seen.sum(-1, keepdim=True).clamp(min=1))


def _by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, stably: (order [G,N], first slot of each label [G,clusters+1])."""
    labels, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(clusters + 1, dtype=labels.dtype, device=labels.device).repeat(labels.shape[0], 1)
    return order, torch.searchsorted(labels, edges)
