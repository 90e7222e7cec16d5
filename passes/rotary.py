"""Which frame grid do rotary tables belong to? Read off their values.

A rotary table over a video has one row per token, tokens frame by frame and row by row. Each column turns
with one coordinate only: columns of the width change from token to token, columns of the height every W
tokens, columns of the time every H*W tokens. So the grid is the set of periods at which columns change.
Graphs of single transformer blocks know the grid from nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def grid_from_rotary(tables: Sequence[Tensor], num_video_tokens: int) -> tuple[int, int, int] | None:
    """(frames, height, width) in tokens, or None where the tables show no grid (text, one dimension).

    tables: all rotary tables that a block receives, of any layout with one dimension of num_video_tokens;
    others are ignored. An image gives frames = 1. Two small reads from the device.

    In half precision neighbouring positions may round to one value, so a single column proves nothing: a
    period counts if some column changes at every multiple of it and nowhere else, and a grid if every column
    is a function of one of its coordinates.
    """
    x = _columns(tables, num_video_tokens)
    if x is None or num_video_tokens < 4:
        return None
    candidates = _grids(_periods(x), num_video_tokens)
    if not candidates:
        return None
    fits = torch.stack([_fits(x, grid) for grid in candidates]).tolist()
    return next((grid for grid, fit in zip(candidates, fits, strict=True) if fit), None)


def is_sequence(tables: Sequence[Tensor], num_tokens: int) -> bool:
    """Whether tables over the tokens know no rows, like positions of text: no token is the first again."""
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


def _periods(x: Tensor) -> list[int]:
    """Periods p > 1 for which some column of x changes at every multiple of p and nowhere else."""
    changed = x[1:] != x[:-1]
    place = torch.arange(1, len(x), device=x.device)[:, None]
    first = torch.where(changed, place, len(x)).amin(0)
    comb = changed == (place % first == 0)
    return sorted({p for p in torch.where(comb.all(0), first, 0).tolist() if 1 < p < len(x)})


def _grids(periods: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """Grids whose width and frame size are among the periods, finest first: coarser ones may fit as well."""
    sizes = [p for p in periods if tokens % p == 0]
    videos = [(tokens // f, f // w, w) for w in sizes for f in sizes if f > w and f % w == 0]
    return videos + [(1, tokens // w, w) for w in sizes]


def _fits(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Whether every column of x is a function of one coordinate of the grid."""
    t, h, w = grid
    y = x.view(t, h, w, -1)
    by_time = (y == y[:, :1, :1]).all(0).all(0).all(0)
    by_height = (y == y[:1, :, :1]).all(0).all(0).all(0)
    by_width = (y == y[:1, :1]).all(0).all(0).all(0)
    return (by_time | by_height | by_width).all()
