"""Video tokens that do not lie in one stretch: the same as if they did, in another order of the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svg_ear_compile.kernels.blocks import places
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
