"""What does a centroid leave out, to first order in the query?

The keys of a skipped block do not weigh the same: a query q weighs those more that lie along it. To first
order the mean value that it finds in block j is not vc_j but

    vc_j + scale C_j^T q,   C_j = 1/n_j sum_{t in j} (k_t - kc_j) (v_t - vc_j)^T   [D,D]

(the derivative of the softmax mean of v_t by q, at q = 0). Applied block by block that were D times the work
of the centroids. One matrix for a query block i brings most of it (docs/TRIED.md): C_j weighted as its query
centroid qc_i weighs the skipped blocks,

    M_i = scale sum_j p_ij C_j,   p_i = softmax_j(scale qc_i.kc_j + bias_ij),
    num(q) += (sum_j exp(s(q,kc_j) + bias_ij)) M_i^T q                       (num: kernels/plan.py)

Computed for the heads where it was measured to make errors smaller; it makes a few larger.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cluster import runs_of
from .dispatch import kernels_for
from .plan import Plan, Terms

# Bytes of the C_j, or of a few queries' M_i, of the heads that are computed at a time.
_CHUNK_BYTES = 2**28
# cuBLAS is three times slower where rows of weights are not aligned to 16 bytes.
_ALIGNED = 8


def terms(plan: Plan, scale: float, heads: Sequence[bool]) -> Terms | None:
    """Of the chosen heads [H]; None where none is."""
    if not any(heads):
        return None
    runs, device = runs_of(heads), plan.key.device
    places = torch.full((len(heads),), -1, dtype=torch.int32, device=device)
    for among_all, among_chosen in runs:
        places[among_all] = torch.arange(among_chosen.start, among_chosen.stop, device=device)
    numbers = torch.cat([torch.arange(run.start, run.stop, device=device) for run, _ in runs])
    return Terms(places, matrices(plan, scale, numbers))


def matrices(plan: Plan, scale: float, heads: Tensor) -> Tensor:
    """M_i of heads [n]: [B,n,Cq,D,D], float32 on a CPU, else of the key's dtype."""
    B, _, _, D = plan.key.shape
    Ck = plan.bias.shape[-1]
    columns = -(-Ck // _ALIGNED) * _ALIGNED
    group = max(1, _CHUNK_BYTES // (B * columns * D * D * plan.key.element_size()))
    covariances = kernels_for(plan.key).covariance.covariances
    found = []
    for some in heads.split(group):
        logits = plan.query_centroids[:, some].float() @ plan.key_centroids[:, some].float().mT
        weights = torch.softmax(scale * logits + plan.bias[:, some], dim=-1).nan_to_num_(0)
        blocks = covariances(
            plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids, some, columns
        )
        weights = F.pad(scale * weights, (0, columns - Ck)).to(blocks.dtype)
        found.append((weights @ blocks.flatten(-2)).unflatten(-1, (D, D)))
    return torch.cat(found, dim=1)


def linear(query: Tensor, blocks: Tensor, plan: Plan, scale: float) -> Tensor:
    """M_i^T q of few queries [B,H,n,D] in the query blocks i [B,H,n] int64, of every head: float32."""
    B, H, n, D = query.shape
    index = blocks[..., None]
    # Each query as a block of its own: most blocks have none.
    of_rows = plan._replace(
        query_centroids=torch.take_along_dim(plan.query_centroids, index, dim=2),
        bias=torch.take_along_dim(plan.bias, index, dim=2),
    )
    group = max(1, _CHUNK_BYTES // (4 * B * n * D * D))
    found = []
    for some in torch.arange(H, device=query.device).split(group):
        rows = query[:, some, :, None].float()
        found.append((rows @ matrices(of_rows, scale, some).float())[..., 0, :])
    return torch.cat(found, dim=1)
