"""The three steps of one level of the balanced splits (kernels/blocks/splits.py), in plain PyTorch.

x [G,N,D]: the tokens of G heads. order [G,N] int32: slot -> token. Slots from `live` [1] int32 on hold masked
tokens, which have no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens of a segment, evenly spaced, that its direction is found from.
SAMPLE = 256
# A mixture of the leading directions splits nearly as well as the first alone. Mean squared radius of blocks
# of 64 against 30 iterations: 4 give 1.02x, 2 give 1.04x, 1 gives 1.07 - 1.18x (4,096 tokens in 40 clusters,
# D = 128).
ITERATIONS = 8
# Norms below are those of segments without extent.
SMALLEST_NORM = 1e-18


def bytes_per_token(head_dim: int) -> int:
    """Working memory: two float32 copies."""
    return 8 * head_dim


def edges(n: int, block: int, segments: int, device: torch.device) -> Tensor:
    """Where the segments of n slots start, and the last one ends: [segments + 1] int64."""
    tiles = -(-n // block)
    first = (torch.arange(segments + 1, device=device) * tiles + segments - 1) // segments
    return (first * block).clamp(max=n)


def longest(n: int, block: int, segments: int) -> int:
    """At least as many slots as any segment has."""
    tiles = -(-n // block)
    return -(-tiles // segments) * block


def directions(x: Tensor, order: Tensor, live: Tensor, start: Tensor, block: int, segments: int) -> Tensor:
    """First principal direction of each segment, roughly: [G,segments,D] float32.

    Power iterations v <- X^T (X v - mean), each followed by v <- v / |v|, from start [D] float32; the mean is
    taken of X v, so X is never centred in memory. X are the segment's live tokens, at most SAMPLE of them.
    """
    G, N, D = x.shape
    ends = edges(N, block, segments, x.device).clamp(max=live)
    first, size = ends[:-1, None], ends.diff()[:, None]
    i = torch.arange(min(SAMPLE, longest(N, block, segments)), device=x.device)
    slots = first + torch.where(size > SAMPLE, i * size // SAMPLE, i)
    weight = (i < size).float()
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    head = torch.arange(G, device=x.device).view(G, 1, 1)
    rows = x[head, order[:, slots.clamp(max=N - 1)]].float()
    rows = torch.where(weight[..., None] > 0, rows, 0)
    direction = start.expand(G, segments, D)
    for _ in range(ITERATIONS):
        along = (rows @ direction[..., None]).squeeze(-1)
        along = (along - (along * weight).sum(-1, keepdim=True) / count) * weight
        direction = (along[..., None, :] @ rows).squeeze(-2)
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    return direction


def project(x: Tensor, order: Tensor, live: Tensor, directions: Tensor, block: int) -> Tensor:
    """Coordinates along the segments' directions, slot by slot: [G,N] float32, infinite from `live` on.

    A NaN or infinite token gets a finite coordinate, because its segment must stay a permutation.
    """
    G, N, _ = x.shape
    head, slot = torch.arange(G, device=x.device)[:, None], torch.arange(N, device=x.device)
    segment = slot // block * directions.shape[1] // -(-N // block)
    along = torch.nan_to_num((x[head, order].float() * directions[:, segment]).sum(-1))
    return torch.where(slot < live, along, torch.inf)


def partition(along: Tensor, order: Tensor, block: int, segments: int) -> Tensor:
    """The order [G,N] int32 once each segment's tokens of the smaller coordinates are in its first half."""
    G, N = along.shape
    tiles, device = -(-N // block), along.device
    ends, slot = edges(N, block, segments, device), torch.arange(N, device=device)
    first, middle = ends[:-1, None], edges(N, block, 2 * segments, device)[1::2, None]
    width = longest(N, block, segments)
    slots = first + torch.arange(width, device=device)
    value = torch.where(slots < ends[1:, None], along[:, slots.clamp(max=N - 1)], torch.nan)
    half = (middle - first).expand(G, -1, -1)
    # NaN, where there is no token, sorts last. Nothing is below the pivot of an empty half, or equal to it.
    pivot = value.sort(dim=-1).values.gather(-1, (half - 1).clamp(min=0))
    pivot = torch.where(half > 0, pivot, -torch.inf)
    less, equal = value < pivot, value == pivot
    left = less | (equal & (equal.cumsum(-1) <= half - less.sum(-1, keepdim=True)))
    through = left.cumsum(-1)
    place = torch.where(left, first + through - 1, middle + slots - first - through)
    segment = slot // block * segments // tiles
    place = place.flatten(1)[:, segment * width + slot - ends[segment]]
    # Places are distinct, so the order of the writes does not matter.
    return torch.empty_like(order).scatter_(1, place, order)
