"""What does a centroid leave out, to first order in the query?

The keys of a skipped block do not all weigh the same: a query q gives more weight to those that lie along it. To
first order the mean value that it finds in block j is not vc_j but

    vc_j + scale C_j^T q,   C_j = 1/n_j sum_{t in j} (k_t - kc_j) (v_t - vc_j)^T   [D,D]

(the derivative of the softmax mean of v_t by q, at q = 0). Applied block by block, that would be D times the work of
the centroids. One matrix for a query block i captures most of it (docs/TRIED.md): C_j weighted as its query centroid
qc_i weighs the skipped blocks,

    M_i = scale sum_j p_ij C_j,   p_i = softmax_j(scale qc_i.kc_j + bias_ij),
    num(q) += (sum_j exp(s(q,kc_j) + bias_ij)) M_i^T q                       (num: kernels/plan.py)

It is computed for the heads where a trial measured smaller errors; in a few heads it makes them larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import context
from ..dispatch import kernels_for
from ..heads import on_device
from ..plan import SparsePlan, Terms

# Bytes of the C_j, or of a few queries' M_i, of the heads that are computed at a time.
_CHUNK_BYTES = 2**27
# Bytes of the M_i that a launch of attention reads: if all heads need more, they are taken in parts.
_PART_BYTES = 2**28
# cuBLAS is three times slower where rows of weights are not aligned to 16 bytes.
_ALIGNED = 8


def attend(
    query: Tensor, plan: SparsePlan, scale: float, out: Tensor, variable: bool, chosen: Sequence[bool]
) -> Tensor:
    """Writes the joint softmax into out, with terms in the chosen heads [H] (none: ()); returns out.

    The M_i of all heads of a long video take as much memory as its values. So they are made for some heads at a time.
    """
    kernel, device, named = kernels_for(query).attention.attend, query.device, tuple(chosen)
    if not any(named):
        return kernel(query, plan, scale, out, variable)
    B, H, blocks, D = plan.query_centroids.shape
    most = max(1, _PART_BYTES // (blocks * D * D * query.element_size()))
    whole = most >= B * H
    step = H if whole else -(-H // -(-H // most))
    parts = [slice(first, first + step) for first in range(0, H, step)]
    numbered = context.current().memo.remember(
        device, ("heads", named, step), lambda: [on_device(named[part], device) for part in parts]
    )
    for b in [slice(None)] if whole else [slice(b, b + 1) for b in range(B)]:
        for part, heads in zip(parts, numbered, strict=True):
            some = SparsePlan(*(x[b, part] for x in plan))
            terms = Terms(heads.places, matrices(some, scale, heads.numbers)) if any(named[part]) else None
            kernel(query[b, part], some, scale, out[b, part], variable, terms=terms)
            del terms  # before the next ones are made
    return out


def matrices(plan: SparsePlan, scale: float, heads: Tensor) -> Tensor:
    """M_i of heads [n]: [B,n,Cq,D,D], float32 on a CPU, else of the key's dtype."""
    queries, weights_of = plan.query_centroids, kernels_for(plan.key).covariance.weights
    weights = weights_of(queries, plan.bias, plan.key_centroids, heads, scale, _columns(plan))
    out: Tensor | None = None
    done = 0
    for some, covariances in _covariances(plan, heads):
        if out is None:
            out = covariances.new_empty((len(queries), len(heads), queries.shape[2], *covariances.shape[3:]))
        for b in range(len(out)):  # each written where it belongs: together they are large
            part = slice(done, done + len(some))
            torch.bmm(weights[b, part], covariances[b].flatten(-2), out=out[b, part].flatten(-2))
        done += len(some)
    assert out is not None
    return out


def linear(query: Tensor, blocks: Tensor, plans: Sequence[SparsePlan], scale: float) -> list[Tensor]:
    """M_i^T q of few queries [B,H,n,D] in the query blocks i [B,H,n] int64, of every head: float32.

    One for each of the plans, which differ only in what their routing chose: the C_j are made once.
    """
    B, H, n, D = query.shape
    # Each query as a block of its own: most blocks have none.
    index = blocks[..., None]
    centroids = torch.take_along_dim(plans[0].query_centroids, index, dim=2)
    biases = [torch.take_along_dim(plan.bias, index, dim=2) for plan in plans]
    found: list[list[Tensor]] = [[] for _ in plans]
    covariance, keys = kernels_for(query).covariance, plans[0].key_centroids
    for some, covariances in _covariances(plans[0], torch.arange(H, device=query.device), 4 * B * n * D * D):
        rows = query[:, some, :, None].float()
        for bias, of_plan in zip(biases, found, strict=True):
            weights = covariance.weights(centroids, bias, keys, some, scale, covariances.shape[2])
            m = (weights @ covariances.flatten(-2)).unflatten(-1, (D, D))
            of_plan.append((rows @ m.float())[..., 0, :])
    return [torch.cat(x, dim=1) for x in found]


def _columns(plan: SparsePlan) -> int:
    return -(-plan.bias.shape[-1] // _ALIGNED) * _ALIGNED


def _covariances(plan: SparsePlan, heads: Tensor, bytes_of_head: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """C_j [B,some,columns,D,D] of a few of the heads [n] at a time: (some, C_j).

    columns: key blocks and, for cuBLAS, some zeros. bytes_of_head: what else takes memory for each head.
    """
    B, _, _, D = plan.key.shape
    columns = _columns(plan)
    group = max(1, _CHUNK_BYTES // max(B * columns * D * D * plan.key.element_size(), bytes_of_head))
    tensors = (plan.key, plan.value, plan.key_offsets, plan.key_centroids, plan.value_centroids)
    for some in heads.split(group):
        yield some, kernels_for(plan.key).covariance.covariances(*tensors, some, columns)
