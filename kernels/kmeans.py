"""The paper's clusters: Euclidean k-means per head, carried on from step to step.

arXiv 2603.08982 and 2505.18875: queries and keys after their norms and rotary embedding are clustered
separately, with 50 iterations at first and 2 per step from the last step's centroids; an empty cluster keeps
its centroid. One iteration:

    label_t = argmin_c |x_t - m_c|^2 = argmin_c (|m_c|^2 / 2 - x_t . m_c),  the lowest index wins ties
    m_c = mean of {x_t : label_t = c}
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_ITERATIONS = 50
NEXT_ITERATIONS = 2
# Bytes of the distance matrix [heads, tokens, clusters] that are alive at a time.
_CHUNK_BYTES = 2**28


def kmeans(
    x: Tensor, valid: Tensor | None, clusters: int, carried: Tensor | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters x [B,H,N,D]: (order [B,H,N], offsets [B,H,clusters+1], centroids [B,H,clusters,D] float32).

    Order and offsets are int64. Tokens that are not valid ([B,N] bool) take no part and come last in the
    order, behind the last offset. Carried centroids of another shape or device are dropped.
    """
    B, H, N, D = x.shape
    shape = (B, H, clusters, D)
    if carried is not None and (carried.shape != shape or carried.device != x.device):
        carried = None
    order = torch.empty((B, H, N), dtype=torch.int64, device=x.device)
    offsets = torch.empty((B, H, clusters + 1), dtype=torch.int64, device=x.device)
    centroids = torch.empty(shape, dtype=torch.float32, device=x.device)
    step = max(1, _CHUNK_BYTES // (N * max(clusters, D) * 4))
    first = _first_tokens(valid, N, clusters, seed, x.device).expand(B, -1) if carried is None else None
    for b in range(B):
        seen = None if valid is None else valid[b]
        for h in range(0, H, step):
            part = (b, slice(h, h + step))
            tokens = x[part].float()
            if seen is not None:
                tokens = torch.where(seen[:, None], tokens, 0)
            if first is not None:
                start, iterations = tokens.index_select(1, first[b]), FIRST_ITERATIONS
            else:
                assert carried is not None
                # A NaN of one step must not stay in the clusters for ever.
                start, iterations = torch.nan_to_num(carried[part].float()), NEXT_ITERATIONS
            order[part], offsets[part], centroids[part] = _lloyd(tokens, seen, start, iterations)
    return order, offsets, centroids


def _first_tokens(valid: Tensor | None, n: int, clusters: int, seed: int, device: torch.device) -> Tensor:
    """Distinct valid tokens to start from [1 or B, clusters]; with fewer valid ones they repeat.

    Drawn on the CPU, so that every device starts alike; the global generator is not touched.
    """
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device)
    slots = torch.arange(clusters, device=device)
    if valid is None:
        return drawn[slots % n][None]
    seen = valid[:, drawn]
    drawn = drawn[(~seen).to(torch.uint8).argsort(dim=-1, stable=True)]
    return drawn.gather(-1, slots % seen.sum(-1, keepdim=True).clamp(min=1))


def _lloyd(
    x: Tensor, valid: Tensor | None, centroids: Tensor, iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterations on x [G,N,D] from centroids [G,C,D]: the last assignment (order, offsets) and its means."""
    for _ in range(iterations):
        labels = _assign(x, centroids)
        if valid is not None:
            labels = torch.where(valid, labels, centroids.shape[1])
        order, offsets = _by_label(labels, centroids.shape[1])
        centroids = _means(x, order, offsets, centroids)
    return order, offsets, centroids


def _assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each token [G,N]."""
    half = centroids.square().sum(-1)[:, None] / 2
    rows = max(1, _CHUNK_BYTES // (x.shape[0] * centroids.shape[1] * 4))
    return torch.cat([torch.baddbmm(half, t, centroids.mT, alpha=-1).argmin(-1) for t in x.split(rows, 1)], 1)


def _by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by label, stably: (order [G,N], first slot of each label [G,clusters+1])."""
    labels, order = labels.sort(dim=-1, stable=True)
    edges = torch.arange(clusters + 1, device=labels.device).repeat(labels.shape[0], 1)
    return order, torch.searchsorted(labels, edges)


def _means(x: Tensor, order: Tensor, offsets: Tensor, before: Tensor) -> Tensor:
    """Means of the clusters [G,C,D]; an empty one keeps the centroid that it had before."""
    G, N, D = x.shape
    rows = order + torch.arange(G, device=x.device)[:, None] * N
    x = x.reshape(G * N, D).index_select(0, rows.flatten()).view(G, N, D)
    # Sums of sorted runs, in a fixed order: adding by label would be atomic on CUDA.
    sums = torch.segment_reduce(x, "sum", offsets=offsets, axis=1, initial=0, unsafe=True)
    sizes = offsets.diff(dim=-1)[..., None]
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), before)
