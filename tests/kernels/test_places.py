"""Video tokens that do not lie in one stretch: the same as if they did, in another order of the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels import context, planning
from svg_ear_compile.kernels.blocks import places
from svg_ear_compile.kernels.blocks.cubes import cubes
from svg_ear_compile.kernels.constants import SiteConstants
from svg_ear_compile.kernels.ops import attention

GRID, TEXT, SHARDS = (3, 8, 10), 18, 2
VIDEO = 240
LENGTH = VIDEO + TEXT


def constants(order: str, text_first: bool, shards: int) -> SiteConstants:
    grid = list(GRID)
    return SiteConstants(None, TEXT, text_first, grid, order, "output_error", True, 0.3, 0, 0, shards=shards)


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, LENGTH, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("text_first", [False, True])
def test_shares_of_ranks_lie_end_to_end(text_first: bool) -> None:
    found = places.of_shards(10, constants("cubes", text_first, 2)._replace(num_text=4), torch.device("cpu"))
    assert found.video.tolist() == ([2, 3, 4, 7, 8, 9] if text_first else [0, 1, 2, 5, 6, 7])
    assert sorted([*found.video.tolist(), *found.other.tolist()]) == list(range(10))
    with pytest.raises(ValueError, match="in 3 equal shares"):
        places.of_shards(10, constants("cubes", text_first, 3), torch.device("cpu"))


@pytest.mark.parametrize("order", ["cubes", "splits", "kmeans"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_same_tokens_in_one_stretch(order: str, masked: bool) -> None:
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
        mask[0, ..., -5:] = mask[1, ..., 3:90] = False
    c = constants(order, False, SHARDS)
    lies = places.of_shards(LENGTH, c, torch.device("cpu"))
    tokens = torch.cat([lies.video, lies.other])

    got = attention(*qkv(), mask, *c)
    in_one = [x[:, :, tokens] for x in qkv()]
    expected = attention(*in_one, None if mask is None else mask[..., tokens], *c._replace(shards=1))

    torch.testing.assert_close(got[:, :, tokens], expected, rtol=0, atol=0)
    wrong = attention(*qkv(), mask, *c._replace(shards=1))
    assert (wrong - got).abs().max() > 1e-3, "a difference would be seen"


PACKED_GRIDS = ((1, 6, 10), (3, 6, 10))
"""A keyframe and a clip: 240 rows."""


def packed() -> places.Packed:
    """Their rows in a sequence that has others before, between and after them."""
    video = torch.cat([torch.arange(5, 65), torch.arange(70, 250)])
    other = torch.tensor([row for row in range(LENGTH) if row not in set(video.tolist())])
    return places.Packed(places.Places(video, other, "name"), PACKED_GRIDS)


def call_of(rows: places.Packed | None) -> context.RunContext:
    return context.RunContext(context.Decisions(packed=rows, strict=True))


@pytest.mark.parametrize("order", ["cubes", "splits"])
def test_packed_rows_equal_the_same_in_one_stretch(order: str) -> None:
    rows = packed()
    tokens = torch.cat([rows.places.video, rows.places.other])
    c = constants(order, False, 1)._replace(num_text=0, grid=[], packed=True)
    with context.active(call := call_of(rows)):
        got = attention(*qkv(), None, *c)
    assert not call.results.dense
    in_one = torch.arange(LENGTH)
    straight = places.Packed(places.Places(in_one[:VIDEO], in_one[VIDEO:], "another"), PACKED_GRIDS)
    with context.active(call_of(straight)):
        expected = attention(*(x[:, :, tokens] for x in qkv()), None, *c)
    assert torch.equal(got[:, :, tokens], expected)
    dense = torch.nn.functional.scaled_dot_product_attention(*qkv())
    exact = [(got - dense)[:, :, of].abs().max() for of in (rows.places.other, rows.places.video)]
    assert exact[0] < 1e-5 < 1e-2 < exact[1], "queries that are no video meet all keys exactly"


def test_blocks_of_packed_rows_are_cubes_of_each_grid() -> None:
    rows, c = packed(), constants("cubes", False, 1)._replace(num_text=0, grid=[], packed=True)
    with context.active(call_of(rows)):
        c = context.current().decisions.constants(c)
        plan = planning.make_plan(*qkv(), None, c)
    keyframe, clip = (cubes(grid, torch.device("cpu")) for grid in PACKED_GRIDS)
    lies = torch.cat([keyframe, clip + len(keyframe)])
    assert torch.equal(plan.key_order[0, 0].long(), torch.cat([rows.places.video[lies], rows.places.other]))


@pytest.mark.parametrize(
    "rows", [None, packed()._replace(places=packed().places._replace(other=torch.arange(3)))]
)
def test_unknown_rows_are_dense(rows: places.Packed | None) -> None:
    """The model was not called with them, or not with as many as there are."""
    c = constants("auto", False, 1)._replace(num_text=0, grid=[], packed=True)
    with context.active(call := call_of(rows)):
        got = attention(*qkv(), None, *c)
    assert call.results.dense == {0: "its video rows are not known"}
    assert torch.equal(got, torch.nn.functional.scaled_dot_product_attention(*qkv()))


@pytest.mark.parametrize(("least", "reason"), [(241, "too few tokens"), (240, "")])
def test_rows_of_video_count(least: int, reason: str) -> None:
    c = constants("auto", False, 1)._replace(num_text=0, grid=[], packed=True, min_tokens=least, min_frames=2)
    with context.active(call := call_of(packed())):
        attention(*qkv(), None, *c)
    assert call.results.dense == ({0: reason} if reason else {})


def test_a_single_image_is_no_video() -> None:
    rows = packed()._replace(grids=((1, 24, 10),))
    c = constants("auto", False, 1)._replace(num_text=0, grid=[], packed=True, min_frames=2)
    with context.active(call := call_of(rows)):
        attention(*qkv(), None, *c)
    assert call.results.dense == {0: "one frame"}


@pytest.mark.parametrize(("rows", "tried"), [(None, False), (packed(), True)], ids=["unknown", "known"])
def test_a_dense_call_tries_nothing_where_it_could_not_be_sparse(
    rows: places.Packed | None, tried: bool
) -> None:
    c = constants("auto", False, 1)._replace(num_text=0, grid=[], packed=True)
    trial = context.Measure(0, (0.3,), ("cubes", "splits"))
    decisions = context.Decisions(
        {0: context.SiteDecision("warm-up", measure=trial)}, packed=rows, strict=True
    )
    with context.active(call := context.RunContext(decisions)):
        attention(*qkv(), None, *c)
    assert bool(call.results.measured) == tried
