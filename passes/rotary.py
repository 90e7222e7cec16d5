"""Which frame grid do rotary tables belong to? Read off their values.

A rotary table over a video has one row per token, tokens frame by frame and row by row. Each column turns
with one coordinate only: columns of the width change from token to token, columns of the height every W
tokens, columns of the time every H*W tokens. So the grid is the set of periods at which columns change.
A graph of a single transformer block has nothing else that shows the grid.

Under context parallelism a block gets only the rows of its own rank's tokens, which need not be whole frames. Their
place among all tokens is known, so periods are counted from the very first token. A rank that holds no more than one
frame of tokens cannot tell how long a frame is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_from_rotary(
    tables: Sequence[Tensor], num_video_tokens: int, shards: int = 1, shard: int = 0
) -> tuple[int, int, int] | None:
    """(frames, height, width) in tokens, or None where the tables show no grid (text, one dimension).

    tables: all rotary tables that a block receives, of any layout with one dimension of num_video_tokens, or of
    num_video_tokens / shards: then they belong to share number `shard` of so many; others are ignored. An image
    gives frames = 1. Two small reads from the device.

    In half precision neighbouring positions may round to one value, so a single column proves nothing: a
    period counts if some column changes at every multiple of it and nowhere else, and a grid if every column
    is a function of one of its coordinates.
    """
    x, start = _columns(tables, num_video_tokens), 0
    if x is None and shards > 1 and num_video_tokens % shards == 0:
        x = _columns(tables, num_video_tokens // shards)
        start = shard * (num_video_tokens // shards)
    if x is None or len(x) < 4:
        return None
    candidates = _grids(_periods(x, start), num_video_tokens)
    candidates = [grid for grid in candidates if grid[1] * grid[2] < len(x) or len(x) == num_video_tokens]
    if not candidates:
        return None
    fits = torch.stack([_fits(x, grid, start) for grid in candidates]).tolist()
    return next((grid for grid, fit in zip(candidates, fits, strict=True) if fit), None)


def is_sequence(tables: Sequence[Tensor], num_tokens: int) -> bool:
    """Whether tables over the tokens show no rows, like positions of text: no later token is like the first one in
    all columns that change from token to token."""
    x = _columns(tables, num_tokens)
    if x is None or num_tokens < 3:
        return False
    fast = x[1] != x[0]
    return not bool(((x[2:] == x[0]) | ~fast).all(1).any())


def _columns(tables: Sequence[Tensor], tokens: int) -> Tensor | None:
    """All tables as one of [tokens, columns]; batch entries are alike, so the first is taken."""
    found = []
    for table in tables:
        x = torch.view_as_real(table.detach()) if table.is_complex() else table.detach()
        if x.is_floating_point() and tokens in x.shape[:-1]:
            while x.shape[0] != tokens:
                x = x[0]
            found.append(x.reshape(tokens, -1))
    return torch.cat([x.to(found[0].dtype) for x in found], dim=1) if found else None


def _periods(x: Tensor, start: int) -> list[int]:
    """Periods p > 1 for which some column of x changes at every multiple of p and nowhere else.

    x: the rows from number `start` on. A column that changes only once shows no period: every period that fits is
    returned.
    """
    changed = x[1:] != x[:-1]
    place = torch.arange(start + 1, start + len(x), device=x.device)[:, None]
    first = torch.where(changed, place, start + len(x)).amin(0)
    later = torch.where(changed & (place > first), place, start + len(x)).amin(0)
    once = (changed.sum(0) == 1) & (first - start < len(x))
    period = (later - first).clamp(min=1)
    comb = (changed == (place % period == 0)).all(0) & (later < start + len(x))
    found = set(torch.where(comb, period, 0).tolist())
    for place_of in set(torch.where(once, first, 0).tolist()) - {0}:
        low = max(place_of - start, start + len(x) - place_of)
        found |= {p for p in _divisors(place_of) if p >= low}
    return sorted(p for p in found if 1 < p < len(x))


def _divisors(n: int) -> list[int]:
    return [p for p in range(1, n + 1) if n % p == 0]


def _grids(periods: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """Grids whose width and frame size are among the periods, finest first: coarser ones may fit as well."""
    sizes = [p for p in periods if tokens % p == 0]
    videos = [(tokens // f, f // w, w) for w in sizes for f in sizes if f > w and f % w == 0]
    return videos + [(1, tokens // w, w) for w in sizes]


def _fits(x: Tensor, grid: tuple[int, int, int], start: int) -> Tensor:
    """Whether every column of x, the rows from number `start` on, is a function of one coordinate of the grid."""
    _, h, w = grid
    changed = x[1:] != x[:-1]
    place = torch.arange(start + 1, start + len(x), device=x.device)[:, None]
    by_time = ~(changed & (place % (h * w) != 0)).any(0)
    by_height = ~(changed & (place % w != 0)).any(0) & (x[h * w :] == x[: -h * w]).all(0)
    by_width = (x[w:] == x[:-w]).all(0)
    return (by_time | by_height | by_width).all()
