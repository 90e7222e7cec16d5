"""How much would be lost if a block were not computed exactly? Query centroids against all true keys."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Per query block and key block, [B,H,Cq,Ck] float32, -inf for an empty key block.

    error: log of the estimated squared error of leaving the block to its centroid, per unit of cost
    (its scale is the routing's business). mass: log n_j + s(qc_i, kc_j). gap: the Jensen gap
    LSE_t s(qc_i, k_t) - log n_j - s(qc_i, kc_j) >= 0.
    """

    error: Tensor
    mass: Tensor
    gap: Tensor


def probe(
    query_centroids: Tensor,
    key: Tensor,
    value: Tensor,
    key_offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    scale: float,
    routing: str,
) -> Scores:
    """Scores of all blocks; key and value are in block order."""
    raise NotImplementedError
