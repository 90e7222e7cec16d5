"""Tokens that ranks exchange: what each rank held comes together as the tokens of all, and comes apart again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from models.capture import Captured, described
from models.graphs import captured
from parallel.worlds import fake_world
from torch import Tensor

RANKS, RANK = 4, 2
VIDEO = (2, 6, 8)
"""Each of four ranks has half a frame."""
TEXT = 8


def to_heads(x: Tensor) -> Tensor:
    """[B, S/P, H, D], all heads of a share of the tokens -> [B, S, H/P, D], a share of the heads."""
    B, S, H, D = x.shape
    x = x.reshape(B, S, RANKS, H // RANKS, D).permute(2, 1, 0, 3, 4).contiguous()
    y = funcol.all_to_all_single(x.flatten(), None, None, dist.group.WORLD)
    return funcol.wait_tensor(y).reshape(x.shape).flatten(0, 1).permute(1, 0, 2, 3)


def to_tokens(x: Tensor) -> Tensor:
    """The way back."""
    B, S, H, D = x.shape
    x = x.reshape(B, RANKS, S // RANKS, H, D).permute(1, 3, 0, 2, 4).contiguous()
    y = funcol.all_to_all_single(x.flatten(), None, None, dist.group.WORLD)
    return funcol.wait_tensor(y).reshape(x.shape).flatten(0, 1).permute(1, 2, 0, 3)


def attend(x: Tensor, context: Tensor | None = None) -> Tensor:
    """Attention of [B, S/P, C] over the tokens of all ranks."""
    context = x if context is None else context
    q, k, v = (to_heads(y.unflatten(-1, (RANKS, -1))) for y in (x, context, context))
    out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)))
    return to_tokens(out.transpose(1, 2)).flatten(2)


def share(x: Tensor, dim: int = 1) -> Tensor:
    return x.chunk(RANKS, dim)[dist.get_rank()]


def run(function: Callable[..., Any], *args: Any, **how: Any) -> Captured:
    with fake_world(RANKS, RANK):
        return captured(function, *args, **how)


def clip() -> Tensor:
    return torch.randn(1, 64, *VIDEO)


def tokens(video: Tensor) -> Tensor:
    return video.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_shared_clip_is_whole_again_in_every_layer(dynamic: bool) -> None:
    def model(hidden_states: Tensor) -> Tensor:
        x = share(tokens(hidden_states))
        x = attend(x)  # without a residual: the way back must lead to the same tokens
        return attend(x)

    sites = run(model, clip(), dynamic=dynamic).sites
    assert [described(site) for site in sites] == [" self REWRITTEN 2x6x8"] * 2
    assert {(site.layout.shards, site.layout.shard) for site in sites} == {(RANKS, RANK)}


def test_text_of_every_rank_is_found() -> None:
    def model(hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x, text = share(tokens(hidden_states)), share(encoder_hidden_states)
        x = attend(torch.cat([x, text], 1))
        return attend(x)

    sites = run(model, clip(), torch.randn(1, TEXT, 64)).sites
    assert [described(site) for site in sites] == [" joint REWRITTEN text=8 last 2x6x8"] * 2


def test_packed_tokens_are_known_by_their_shares() -> None:
    def block(hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return attend(hidden_states), attend(hidden_states, encoder_hidden_states)

    arguments = torch.randn(1, 24, 64), torch.randn(1, 24, 64)
    kinds = [site.kind for site in run(block, *arguments).sites]
    assert kinds == ["self", "cross"], "as many tokens, but others"


def test_shares_that_are_not_this_ranks_own_are_no_video_in_order() -> None:
    def model(hidden_states: Tensor) -> Tensor:
        x = tokens(hidden_states).chunk(RANKS, 1)[
            RANKS - 1 - dist.get_rank()
        ]  # the last rank has the first tokens
        return attend(x)

    (site,) = run(model, clip()).sites
    assert (site.kind, site.layout.grid) == ("self", None)


def test_an_exchange_in_unequal_parts_loses_the_tokens() -> None:
    def model(hidden_states: Tensor) -> Tensor:
        x = share(tokens(hidden_states)).transpose(0, 1)  # [24, 1, 64]
        y = funcol.all_to_all_single(x, [3, 5, 7, 9], [9, 7, 5, 3], dist.group.WORLD)
        y = funcol.wait_tensor(y).transpose(0, 1).unflatten(-1, (4, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y)

    (site,) = run(model, clip(), min_tokens=1).sites
    assert site.layout.grid is None
    assert site.layout.shards == 1
