"""The probe in plain PyTorch: every score of kernels/probe/__init__.py, from logits in memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import KEY_BLOCK

# Tokens of a slice of a key block: blocks of any sizes are cut into slices, so that reductions are dense.
_SLICE = 32
# Bytes of one [slices, query blocks, D] or [slices, query blocks, _SLICE] float32 temporary.
_CHUNK_BYTES = 2**28


class Scores(NamedTuple):
    """Per query block and key block, [B,H,Cq,Ck] float32, -inf for an empty key block.

    error: log of the estimated squared error of leaving the block to its centroid, per exactly computed key
    (on a scale that only the routing needs). mass: log n_j + s(qc_i, kc_j). gap: the Jensen gap
    LSE_t s(qc_i, k_t) - log n_j - s(qc_i, kc_j) >= 0. With routing "mass" the error is the mass, the gap 0.
    """

    error: Tensor
    mass: Tensor
    gap: Tensor


class _Slices(NamedTuple):
    """Blocks cut into slices of at most T tokens. P slices, in the order of the blocks; spare ones are empty.

    tokens [P,T]: slots; live [P,T]: whether there is one; block [P]: the slice's block; ends [Ck+1]: first
    slice of each block; whole: whether slice and block are the same thing.
    """

    tokens: Tensor
    live: Tensor
    block: Tensor
    ends: Tensor
    whole: bool


def probe(
    query_centroids: Tensor,
    key: Tensor,
    value: Tensor,
    key_offsets: Tensor,
    key_centroids: Tensor,
    value_centroids: Tensor,
    scale: float,
    routing: str,
    variable: bool = True,
) -> Scores:
    """Scores of all blocks (module docstring).

    query_centroids [B,H,Cq,D], key_centroids, value_centroids [B,H,Ck,D] float32; key, value [B,H,L,D] in
    block order, key_offsets [B,H,Ck+1]. Slots from key_offsets[..., -1] on belong to no block.
    variable: whether key blocks may be of any size; False: none holds more than KEY_BLOCK tokens.
    """
    if routing == "mass":
        return centroid_mass(query_centroids, key_centroids, key_offsets, scale)
    if routing not in ("output_error", "svg_ear"):
        raise ValueError(f"unknown routing {routing!r}")
    B, H, Cq, D = query_centroids.shape
    length = key.shape[2]
    sizes = key_offsets.diff(dim=-1)[:, :, None]
    center = scale * (query_centroids @ key_centroids.mT)
    error, lse = torch.empty_like(center), torch.empty_like(center)
    for b in range(B):
        for h in range(H):
            slices = _cut(key_offsets[b, h].long(), length, variable)
            shape = (*slices.tokens.shape, D)
            keys = key[b, h].index_select(0, slices.tokens.flatten()).float()
            values = value[b, h].index_select(0, slices.tokens.flatten()).float().view(shape)
            values = values - value_centroids[b, h].index_select(0, slices.block)[:, None]
            values = values.masked_fill_(~slices.live[..., None], 0)
            step = max(1, _CHUNK_BYTES // (shape[0] * max(D, shape[1]) * 4))
            for i in range(0, Cq, step):
                rows = (b, h, slice(i, i + step))
                logits = (keys @ (scale * query_centroids[rows]).mT).view(*slices.tokens.shape, -1)
                weights, top, lse[rows] = _weights(logits, slices)
                if routing == "svg_ear":
                    base = 2 * (top - top.amax(-1, keepdim=True))
                    ebar = (center[rows] - top).exp()
                    lost = _token_error(weights, ebar, values, value_centroids[b, h], slices)
                else:
                    base = 2 * (top - lse[rows].logsumexp(-1, keepdim=True))
                    lost = _per_block(weights.mT @ values, "sum", slices).square().sum(-1).mT
                error[rows] = base + lost.clamp_(min=0).log()
    # Of integers the logarithm would be of torch's default dtype.
    log_sizes = sizes.float().log()
    mass = center + log_sizes
    gap = (lse - mass).clamp_(min=0)
    # An infinite key may leave logits that are in order, but not the centroid of its block.
    error.masked_fill_(~gap.isfinite(), torch.nan)
    return Scores(*(x.masked_fill_(sizes == 0, -torch.inf) for x in (error - log_sizes, mass, gap)))


def centroid_mass(
    query_centroids: Tensor, key_centroids: Tensor, key_offsets: Tensor, scale: float
) -> Scores:
    """The scores of routing "mass"; float32."""
    sizes = key_offsets.diff(dim=-1)[:, :, None]
    mass = scale * (query_centroids.float() @ key_centroids.float().mT) + sizes.float().log()
    empty = (sizes == 0).expand_as(mass)
    error = mass.masked_fill(~mass.isfinite() & ~empty, torch.nan)
    return Scores(*(x.masked_fill(empty, -torch.inf) for x in (error, mass, torch.zeros_like(mass))))


def _cut(offsets: Tensor, length: int, variable: bool) -> _Slices:
    """Slices of the blocks of one head, offsets [Ck+1] int64. Their number depends on the lengths only."""
    device, blocks = offsets.device, offsets.shape[0] - 1
    if not variable:
        width, block = KEY_BLOCK, torch.arange(blocks, device=device)
        ends, start = torch.arange(blocks + 1, device=device), offsets[:-1]
    else:
        # sum_j ceil(n_j / T) <= (L + Ck (T - 1)) / T
        width = _SLICE
        number = torch.arange((length + blocks * (width - 1)) // width, device=device)
        ends = torch.nn.functional.pad(((offsets.diff() + width - 1) // width).cumsum(0), (1, 0))
        block = torch.searchsorted(ends[1:], number, right=True).clamp(max=blocks - 1)
        start = offsets[block] + (number - ends[block]) * width
    tokens = start[:, None] + torch.arange(width, device=device)
    live = tokens < offsets[1:][block, None]
    return _Slices(tokens.clamp(max=length - 1), live, block, ends, not variable)


def _per_block(x: Tensor, reduce: str, slices: _Slices) -> Tensor:
    """Combines [P, ...], one entry per slice, into [Ck, ...], one per block; in a fixed order."""
    if slices.whole:
        return x
    flat = x.reshape(1, x.shape[0], -1)
    initial = 0.0 if reduce == "sum" else -torch.inf
    flat = torch.segment_reduce(flat, reduce, offsets=slices.ends[None], axis=1, initial=initial, unsafe=True)
    return flat.view(-1, *x.shape[1:])


def _weights(logits: Tensor, slices: _Slices) -> tuple[Tensor, Tensor, Tensor]:
    """exp(s_t - m) of logits [P,T,Cq], 0 where no token is; and m, lse, each [Cq,Ck]. Overwrites logits."""
    logits = logits.masked_fill_(~slices.live[..., None], -torch.inf)
    top = _per_block(logits.amax(1), "max", slices)  # [Ck,Cq]
    # An empty block has the maximum -inf, which must not be subtracted from itself.
    below = top.index_select(0, slices.block).masked_fill_(~slices.live[:, :1], 0)
    weights = logits.sub_(below[:, None]).exp_()
    lse = top + _per_block(weights.sum(1), "sum", slices).log()
    return weights, top.mT, lse.mT


def _token_error(weights: Tensor, ebar: Tensor, values: Tensor, centroids: Tensor, slices: _Slices) -> Tensor:
    """E_ij exp(-2 m_ij) [Cq,Ck] of the paper; values [P,T,D] are centred, ebar [Cq,Ck] is exp(sbar - m)."""
    centroid = centroids.index_select(0, slices.block)[:, None]
    spread = values.square().sum(-1, keepdim=True)  # |v_t - vc|^2, [P,T,1]
    across = (values * centroid).sum(-1, keepdim=True)
    off = weights - ebar.mT.index_select(0, slices.block)[:, None]
    lost = (
        weights.square() * spread
        + 2 * weights * off * across
        + off.square() * centroid.square().sum(-1, True)
    )
    return _per_block(lost.masked_fill_(~slices.live[..., None], 0).sum(1), "sum", slices).mT
