"""What does a centroid leave out, to first order in the query?

The keys of a skipped block do not all weigh the same: a query q gives more weight to those that lie along it. To
first order the mean value that it finds in block j is not vc_j but

    vc_j + scale C_j^T q,   C_j = 1/n_j sum_{t in j} (k_t - kc_j) (v_t - vc_j)^T   [D,D]

(the derivative of the softmax mean of v_t by q, at q = 0). Applied block by block, that would be D times the work of
the centroids. One matrix for a group g of consecutive query blocks captures most of it (docs/TRIED.md): C_j weighted as
their query centroids qc_i weigh the skipped blocks,

    M_g = scale mean_{i in g} sum_j p_ij C_j,   p_i = softmax_j(scale qc_i.kc_j + bias_ij),
    num(q) += (sum_j exp(s(q,kc_j) + bias_ij)) M_g^T q                       (num: kernels/plan.py)

The mean is over the blocks that skip something; a group is term_blocks(Cq) query blocks.

It is computed for the heads where a trial measured smaller errors; in a few heads it makes them larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import context
from ..dispatch import kernels_for
from ..heads import on_device
from ..plan import SparsePlan, Terms, term_blocks

# Bytes of the heads that are computed at a time: of their C_j and, for a few queries, their M_g.
_CHUNK_BYTES = 2**28
# cuBLAS is three times slower where rows of weights are not aligned to 16 bytes.
_ALIGNED = 8


def attend(
    query: Tensor, plan: SparsePlan, scale: float, out: Tensor, variable: bool, chosen: Sequence[bool]
) -> Tensor:
    """Writes the joint softmax into out, with terms in the chosen heads [H] (none: ()); returns out."""
    kernel, device, named = kernels_for(query).attention.attend, query.device, tuple(chosen)
    if not any(named):
        return kernel(query, plan, scale, out, variable)
    heads = context.current().memo.remember(device, ("heads", named), lambda: on_device(named, device))
    terms = Terms(heads.places, matrices(plan, scale, heads.numbers))
    return kernel(query, plan, scale, out, variable, terms=terms)


def matrices(plan: SparsePlan, scale: float, heads: Tensor) -> Tensor:
    """M_g of heads [n]: [B,n,groups,D,D], float32 on a CPU, else of the key's dtype."""
    weights, D = _weights(plan, heads, scale), plan.key.shape[-1]
    out = weights.new_empty((*weights.shape[:3], D, D))
    done = 0
    for some, covariances in _covariances(plan, heads):
        for b in range(len(out)):  # each written where it belongs
            part = slice(done, done + len(some))
            torch.bmm(weights[b, part], covariances[b].flatten(-2), out=out[b, part].flatten(-2))
        done += len(some)
        del covariances  # before the next ones are made
    return out


def linear(query: Tensor, blocks: Tensor, plans: Sequence[SparsePlan], scale: float) -> list[Tensor]:
    """M_g^T q of few queries [B,H,n,D] in the query blocks i [B,H,n] int64, of every head: float32.

    One for each of the plans, which differ only in what their routing chose: the C_j are made once.
    """
    B, H, n, D = query.shape
    Cq, size = plans[0].bias.shape[2], plans[0].key.element_size()
    group = term_blocks(Cq)
    groups, heads = blocks[..., None] // group, torch.arange(H, device=query.device)
    m_bytes = B * D * D * (-(-Cq // group) * size + n * (size + 4))  # of the groups, and of the queries twice
    found: list[list[Tensor]] = [[] for _ in plans]
    for some, covariances in _covariances(plans[0], heads, m_bytes):
        rows = query[:, some, :, None].float()
        for plan, of_plan in zip(plans, found, strict=True):
            m = _weights(plan, some, scale) @ covariances.flatten(-2)
            # take_along_dim would make a number of 8 bytes for each entry
            m = m.gather(2, groups[:, some].expand(-1, -1, -1, D * D)).unflatten(-1, (D, D))
            of_plan.append((rows @ m.float())[..., 0, :])
        del covariances, m
    return [torch.cat(x, dim=1) for x in found]


def _weights(plan: SparsePlan, heads: Tensor, scale: float) -> Tensor:
    """[B,n,groups,columns]: what of each C_j is in each M_g."""
    weights = kernels_for(plan.key).covariance.weights
    return weights(plan.query_centroids, plan.bias, plan.key_centroids, heads, scale, _columns(plan))


def _columns(plan: SparsePlan) -> int:
    return -(-plan.bias.shape[-1] // _ALIGNED) * _ALIGNED


def _covariances(plan: SparsePlan, heads: Tensor, bytes_of_head: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """C_j [B,some,columns,D,D] of a few of the heads [n] at a time: (some, C_j).

    columns: key blocks and, for cuBLAS, some zeros. bytes_of_head: what else takes memory for each head.
    """
    B, _, _, D = plan.key.shape
    columns = _columns(plan)
    group = max(1, _CHUNK_BYTES // (B * columns * D * D * plan.key.element_size() + bytes_of_head))
    tensors = (plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids)
    for some in heads.split(group):
        yield some, kernels_for(plan.key).covariance.covariances(*tensors, some, columns)
