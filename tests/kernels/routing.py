"""Random scores for the routing, and what kernels/routing/triton.py must make of them: what route.py does."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from svg_ear_compile.kernels.probe import torch as probe
from svg_ear_compile.kernels.routing import torch as route


class Case(NamedTuple):
    """Scores [B,H,Cq,Ck] of which the first `video` (query, key) blocks are video."""

    scores: probe.Scores
    query_offsets: Tensor
    key_offsets: Tensor
    video: tuple[int, int]


def case(
    blocks: tuple[int, int, int, int] = (2, 3, 7, 12),
    text: tuple[int, int] = (1, 2),
    *,
    equal: bool = True,
    masked: bool = False,
    errors: str = "random",
    seed: int = 0,
    device: str = "cpu",
) -> Case:
    """equal: tiles of 128 queries and 64 keys, the last of video and of text ragged; otherwise any sizes.

    masked: keys of a few blocks are gone, and so are the queries of one. errors: "random"; "ties" of few
    values; "equal", all of them; "zeros" of either sign; "bad": NaN blocks, rows and heads, infinities.
    """
    B, H, Cq, Ck = blocks
    g = torch.Generator(device).manual_seed(seed)
    video = (Cq - text[0], Ck - text[1])

    def sizes(count: int, of_video: int, tile: int) -> Tensor:
        if not equal:
            return torch.randint(0, 3 * tile, (B, H, count), generator=g, device=device)
        found = torch.full((B, H, count), tile, device=device)
        found[..., of_video - 1] = tile // 3
        found[..., count - 1] = tile // 3 + 1
        return found

    query_sizes, key_sizes = sizes(Cq, video[0], 128), sizes(Ck, video[1], 64)
    if masked:
        key_sizes[..., video[1] - 2 : video[1]] = 0
        key_sizes[-1, ..., video[1] - 3] = 5
        key_sizes[..., -1] = 0
        query_sizes[0, 0, 1] = 0
    shape = (B, H, Cq, Ck)
    error = 4 * torch.randn(shape, generator=g, device=device) - 8
    if errors == "ties":
        error = (error / 3).round()
    elif errors == "equal":
        error.fill_(-2.5)
    elif errors == "zeros":
        error = torch.where(error > -8, 0.0, -0.0)
    elif errors == "bad":
        error[0, 0, 2, 3:5] = torch.nan
        error[0, 1, 1] = torch.nan
        error[-1, -1] = torch.nan
        error[..., 0, 1::4] = -torch.inf
        error[..., 3, 0] = torch.inf
    empty = (key_sizes == 0)[:, :, None].expand(shape)
    gap = torch.rand(shape, generator=g, device=device).masked_fill(error.isnan(), torch.nan)
    mass = torch.randn(shape, generator=g, device=device)
    scores = probe.Scores(*(x.masked_fill(empty, -torch.inf) for x in (error, mass, gap)))
    offsets = [torch.nn.functional.pad(x.cumsum(-1), (1, 0)).int() for x in (query_sizes, key_sizes)]
    return Case(scores, offsets[0], offsets[1], video)


def check(of: Case, routing: str, density: float | None, compensate: bool = True) -> None:
    """What triton_route selects is what route selects: every list, count and area, and the biases."""
    from svg_ear_compile.kernels.probe.triton import RowScores
    from svg_ear_compile.kernels.routing import triton as triton_route

    B, H, Cq, Ck = of.scores.gap.shape
    want = route.select(*of, routing, density, compensate)
    # Rows on scales of their own, whose parts are two powers of 2 so that taking them off rounds nothing.
    none = torch.full((B, H, 1, Cq), -torch.inf, device=of.scores.gap.device)
    parts = torch.cat([none, torch.zeros_like(none), none], 2)
    # Laid out as the probe does, in lines longer than the rows.
    apart = [torch.nn.functional.pad(x.mT, (0, 5))[..., :Cq].mT for x in of.scores]
    scores = RowScores(*apart, parts)
    for _ in range(2):
        got = triton_route.select(scores, *of[1:], routing, density, compensate)
        assert torch.equal(got.kept_count, want.kept_count)
        listed = torch.arange(Ck, device=parts.device) < want.kept_count[..., None]
        assert torch.equal(
            got.kept_blocks.masked_fill(~listed, -1), want.kept_blocks.masked_fill(~listed, -1)
        )
        every = torch.arange(Ck, device=parts.device, dtype=torch.int32).expand_as(got.kept_blocks)
        assert torch.equal(got.kept_blocks.sort(-1).values, every), "every place holds a block"
        assert torch.equal(got.areas, want.areas)
        torch.testing.assert_close(got.bias, want.bias, rtol=1e-6, atol=0, equal_nan=True)
        assert all(x.is_contiguous() for x in got)
