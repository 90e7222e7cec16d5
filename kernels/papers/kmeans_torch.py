"""The two steps of one iteration of k-means (kernels/papers/kmeans.py), in plain PyTorch.

x [G,N,D]: the tokens of G heads, in any float dtype. centroids [G,C,D] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bytes of the distance matrix [heads, tokens, clusters] that are alive at a time.
_CHUNK_BYTES = 2**28


def bytes_per_token(head_dim: int, clusters: int) -> int:
    """Working memory: distances, or two float32 copies."""
    return 4 * max(clusters, 2 * head_dim)


def assign(x: Tensor, valid: Tensor | None, centroids: Tensor) -> Tensor:
    """The nearest centroid of each token [G,N], the lowest index among equals; C where valid [N] is not set.

    A distance that is not a number counts as infinite.
    """
    G, C, _ = centroids.shape
    half = centroids.square().sum(-1)[:, None] / 2
    labels = []
    for tokens in x.split(max(1, _CHUNK_BYTES // (G * C * 4)), dim=1):
        distances = torch.baddbmm(half, tokens.float(), centroids.mT, alpha=-1)
        labels.append(distances.nan_to_num_(nan=torch.inf, posinf=torch.inf).argmin(-1))
    label = torch.cat(labels, dim=1)
    return label if valid is None else torch.where(valid, label, C)


def means(x: Tensor, order: Tensor, offsets: Tensor, before: Tensor) -> Tensor:
    """Means of the clusters [G,C,D] float32, of x in the order [G,N] from offsets [G,C+1] on; an empty
    cluster keeps the centroid that it had before."""
    rows = x[torch.arange(len(x), device=x.device)[:, None], order].float()
    # Sums of sorted runs, in a fixed order: adding by label would be atomic on CUDA.
    sums = torch.segment_reduce(rows, "sum", offsets=offsets, axis=1, initial=0, unsafe=True)
    sizes = offsets.diff(dim=-1)[..., None]
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), before)
